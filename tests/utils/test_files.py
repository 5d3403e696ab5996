"""Files that others made are read up to a limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.utils.files import UnreadableFile, read_named


def test_a_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "named"
    file.write_bytes(b"1234")
    assert read_named(file, limit=4) == b"1234"
    with pytest.raises(UnreadableFile, match="is larger than 3 bytes"):
        read_named(file, limit=3)
