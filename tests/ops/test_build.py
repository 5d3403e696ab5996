"""Building operators: what happens when it cannot be done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.errors import EnvironmentProblem
from launcher.ops.build import _stop_tree, build_ops
from launcher.protocol.native_ops import is_built, op_library, op_lock, read_build_outcome
from tests.helpers import wait_for
from tests.processes import kill_marked, marked, marked_environment, new_mark


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return an empty folder of operators."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    return tmp_path / "ops"


@pytest.fixture
def endless_compiler(tmp_path: Path) -> Path:
    """Return a compiler that never ends, and leaves its process id."""
    compiler = tmp_path / "endless"
    compiler.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.new\nmv {tmp_path}/pid.new {tmp_path}/pid\nexec sleep 600\n"
    )
    compiler.chmod(0o755)
    return compiler


def test_what_is_built_is_left_alone(folder: Path) -> None:
    op_library("cpu_adam").parent.mkdir(parents=True)
    op_library("cpu_adam").touch()
    said: list[str] = []
    (outcome,) = build_ops(["cpu_adam"], say=said.append)
    assert (outcome.built, outcome.seconds, said) == (True, 0.0, [])


def test_a_good_build_is_built_even_where_ninja_had_nothing_to_link(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = op_library("cpu_adam")
    library.parent.mkdir(parents=True)
    for file, age_s in ((library, 20), (library.with_name("build.ninja"), 10)):
        file.touch()
        os.utime(file, (time.time() - age_s,) * 2)
    monkeypatch.setattr("launcher.ops.build._compile", lambda *arguments, **options: 0)
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there
    (outcome,) = build_ops(["cpu_adam"], say=lambda line: None)
    assert outcome.built
    assert outcome.seconds > 0
    assert is_built("cpu_adam")


def test_a_stale_lock_is_cleared_first(folder: Path) -> None:
    op_library("cpu_adam").parent.mkdir(parents=True)
    op_library("cpu_adam").touch()
    op_lock("cpu_adam").touch()
    said: list[str] = []
    build_ops(["cpu_adam"], say=said.append)
    assert not op_lock("cpu_adam").exists()
    assert len(said) == 1


def test_without_a_compiler_what_is_needed_ends_the_run(folder: Path) -> None:
    program = [sys.executable, "-m", "launcher.ops", "async_io"]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "async_io cannot be built: there is no C++ compiler (no-such-compiler); apt-get install g++" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_a_compiler_what_is_optional_is_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    said: list[str] = []
    build_ops(["cpu_adam?", "fused_adam?"], say=said.append)
    outcome = read_build_outcome(folder, "cpu_adam")
    assert outcome is not None
    assert not outcome.built
    assert "no C++ compiler" in outcome.why
    assert [line.split(",")[0] for line in said] == ["cannot build cpu_adam", "cannot build fused_adam"]


def test_the_limit_ends_a_build_and_its_compilers(
    folder: Path, endless_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(endless_compiler))
    monkeypatch.setattr("launcher.ops.build._SAY_EVERY_S", 0.2)

    def say(line: str) -> None:
        said.append(line)

    said: list[str] = []
    before = set(psutil.Process().children(recursive=True))  # of earlier tests in this process
    with pytest.raises(EnvironmentProblem, match="took longer than 8 s"):
        build_ops(["pin_memory"], say=say, limit_s=8.0)
    assert any(line.startswith("building pin_memory, ") and line.endswith("limit 8 s") for line in said)
    assert not op_lock("pin_memory").exists()
    assert set(psutil.Process().children(recursive=True)) <= before


def test_being_asked_to_end_leaves_no_compiler_and_no_lock(
    folder: Path, endless_compiler: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "CXX": str(endless_compiler)}
    program = subprocess.Popen([sys.executable, "-m", "launcher.ops", "pin_memory"], env=environment)
    wait_for((tmp_path / "pid").exists)
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=60) == 128 + signal.SIGTERM
    compiler = int((tmp_path / "pid").read_text())
    # killed, an orphan is there until the process that adopted it reaps it
    wait_for(lambda: not psutil.pid_exists(compiler), seconds=30)
    assert not op_lock("pin_memory").exists()


def test_compilers_that_start_meanwhile_are_stopped_too() -> None:
    mark = new_mark()
    ninja = "for number in $(seq 300); do sleep 600 & done; wait"
    program = subprocess.Popen(["sh", "-c", ninja], env=marked_environment(mark))
    try:
        wait_for(lambda: len(list(marked(mark))) > 10, process=program)
        _stop_tree(program)
        assert not list(marked(mark))
    finally:
        kill_marked(mark)


def test_an_outcome_is_plain_json(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    build_ops(["cpu_adam?"], say=lambda line: None)
    assert json.loads((folder / "cpu_adam.json").read_text())["built"] is False


def test_a_library_links_where_torch_has_a_path_with_a_space(folder: Path, tmp_path: Path) -> None:
    """torch is found through a link with a space in its name, as in an environment that lies in such a folder."""
    import torch

    (tmp_path / "my ünï libs").mkdir()
    (tmp_path / "my ünï libs" / "torch").symlink_to(Path(torch.__file__).parent)
    (tmp_path / "empty.cpp").write_text('extern "C" int one() { return 1; }\n')
    script = (
        "import os, sys; from launcher.utils.build_cache import quote_torch_library_path; "
        "from launcher.ops.build import path_with_ninja; os.environ['PATH'] = path_with_ninja(); "
        "quote_torch_library_path(); quote_torch_library_path();"
        "from torch.utils import cpp_extension; assert ' ' in cpp_extension.TORCH_LIB_PATH;"
        "cpp_extension.load('empty', [sys.argv[1]], is_python_module=False)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "empty.cpp")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "my ünï libs")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_written_is_named_with_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "ops"))
    said: list[str] = []
    assert build_ops(["cpu_adam?"], say=said.append) == []
    assert said[0].endswith("(Not a directory). Set TORCH_EXTENSIONS_DIR to a folder of yours")
    with pytest.raises(EnvironmentProblem, match="Set TORCH_EXTENSIONS_DIR to a folder of yours"):
        build_ops(["cpu_adam"], say=said.append)
