"""Where operators are, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.protocol.native_ops import is_built, mark_built, op_library, op_lock, ops_folder, ops_to_build
from launcher.protocol.plan import NativeOps


def test_a_folder_that_is_set_is_respected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert ops_folder() == tmp_path


def test_each_environment_has_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = ops_folder()
    assert here.parent == tmp_path / "launcher" / "ops"
    assert "torch" in here.name
    assert "deepspeed" in here.name
    assert ops_folder() == here
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert ops_folder() != here


def test_missing_names_what_is_not_built_or_locked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    ops = NativeOps(needed=("async_io", "pin_memory"), optional=("cpu_adam",))
    assert ops_to_build(ops) == ("async_io", "pin_memory", "cpu_adam?")
    for name in ("async_io", "cpu_adam"):
        op_library(name).parent.mkdir()
        op_library(name).touch()
    assert is_built("async_io")
    assert ops_to_build(ops) == ("pin_memory",)
    op_lock("cpu_adam").touch()
    assert ops_to_build(ops) == ("pin_memory", "cpu_adam?")


def test_one_older_than_its_sources_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    op_library("async_io").parent.mkdir()
    op_library("async_io").touch()
    assert is_built("async_io")
    folder = Path(importlib.util.find_spec("deepspeed").origin).parent / "ops" / "csrc"
    sources = [file for file in folder.rglob("*") if file.is_file()]
    installed = max(file.stat().st_mtime for file in sources)
    os.utime(op_library("async_io"), (installed - 1, installed - 1))  # as when DeepSpeed is installed again
    assert not is_built("async_io")
    assert ops_to_build(NativeOps(needed=("async_io",))) == ("async_io",)
    mark_built("async_io")
    assert is_built("async_io")


@pytest.mark.parametrize("part", ["build.ninja", "cpu_adam_impl.o"])
def test_one_whose_build_was_killed_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    library = op_library("cpu_adam")
    library.parent.mkdir()
    library.touch()
    newer = library.stat().st_mtime + 3600  # also in the future, as where the clocks of two hosts differ
    (library.parent / part).touch()
    os.utime(library.parent / part, (newer, newer))
    assert not is_built("cpu_adam")
    assert ops_to_build(NativeOps(optional=("cpu_adam",))) == ("cpu_adam?",)
    mark_built("cpu_adam")
    assert is_built("cpu_adam")


def test_it_is_answered_without_torch() -> None:
    code = (
        "import sys, launcher.protocol.native_ops as f; f.ops_folder(); print({'torch', 'deepspeed'} & {*sys.modules})"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
