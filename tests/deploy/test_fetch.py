"""The init container's copy of a model from an object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.deploy.fetch import fetch_folder
from launcher.errors import EnvironmentProblem


def test_every_file_is_copied_and_what_a_killed_container_left_is_completed(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "models"
    (store / "tokenizer").mkdir(parents=True)
    (store / "model.safetensors").write_bytes(b"weights")
    (store / "tokenizer/tokenizer.json").write_text("{}")
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"wei")
    assert fetch_folder(f"file://{store}", folder) == 2
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"model.safetensors": b"weights", "tokenizer/tokenizer.json": b"{}"}
    written = (folder / "model.safetensors").stat().st_mtime_ns
    fetch_folder(f"file://{store}", folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("url", ["file:///nowhere/at/all", "nosuchscheme://bucket/model"])
def test_what_cannot_be_copied_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(EnvironmentProblem, match=url.partition(":")[0]):
        fetch_folder(url, tmp_path)
