"""Large files: what is written is what was given, with its checksum, on file systems of every kind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from launcher.checkpoint.file_writer import BLOCK_BYTES, FileWriter

LENGTHS = [0, 1, 511, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES + 777]


def bytes_of(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 256, size=length, dtype=np.uint8)


def written(file: Path, *pieces: np.ndarray) -> tuple[bytes, Any]:
    with FileWriter(file) as out:
        for piece in pieces:
            out.write(piece)
        found = out.finish()
    return file.read_bytes(), found


@pytest.mark.parametrize("length", LENGTHS)
def test_pieces_of_any_length_follow_each_other(tmp_path: Path, length: int) -> None:
    pieces = [bytes_of(5), bytes_of(length), bytes_of(3)]
    (tmp_path / "file").write_bytes(b"longer than what replaces it" * BLOCK_BYTES if length == 0 else b"")
    content, found = written(tmp_path / "file", *pieces)
    assert content == b"".join(piece.tobytes() for piece in pieces)
    assert found.num_bytes == len(content)
    assert found.checksum == xxhash.xxh3_128(content).hexdigest()


@pytest.mark.parametrize("at", ["open", "write"])
def test_a_file_system_without_direct_io_is_written_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    real_open, real_write, refused = os.open, os.write, []

    def open_without(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return real_open(path, flags, mode)

    def write_without(descriptor: int, data: Any) -> int:
        if not refused:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, data)

    monkeypatch.setattr(os, at, open_without if at == "open" else write_without)
    data = bytes_of(BLOCK_BYTES + 5)
    content, _ = written(tmp_path / "file", data)
    assert refused
    assert content == data.tobytes()


@pytest.mark.parametrize(("at", "code"), [("write", errno.ENOSPC), ("fsync", errno.EIO)])
def test_an_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, code: int) -> None:
    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, at, fail)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        written(tmp_path / "file", bytes_of(9))
    assert caught.value.filename == str(tmp_path / "file")
    assert caught.value.errno == code


def test_a_file_that_cannot_be_made_is_not_tried_in_another_way(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        FileWriter(tmp_path / "gone" / "file")
    assert caught.value.filename == str(tmp_path / "gone" / "file")
