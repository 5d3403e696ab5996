"""The Python API: compose, plan, run, and what a result gives."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launcher
from launcher.api.messages import error_from_tree, error_to_tree
from launcher.api.process import StarterProcess
from launcher.errors import ConfigError, ConfigErrors, EnvironmentProblem, LauncherError, Unfit
from tests.conftest import Launch
from tests.torchless import ECHO, endless

SMALL = ["job.steps=6", "backend.ranks=1", "tracker=local"]


def test_importing_it_loads_nothing() -> None:
    code = "import sys, launcher; print([m for m in sys.modules if m.startswith(('launcher.', 'hydra', 'torch'))])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout == "[]\n"
    assert set(launcher.__dir__()) >= {"Plan", "Result", "Run", "compose", "plan", "run"}
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = launcher.train  # type: ignore[attr-defined]


def test_a_composed_run_is_typed_and_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = launcher.compose(SMALL)
    assert (run.job.steps, run.backend.ranks) == (6, 1)  # type: ignore[attr-defined]
    plan = launcher.plan(run)
    assert (plan.work.num_steps, plan.world_size) == (6, 1)
    assert launcher.render(plan).startswith("Plan gpt2_tiny")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_exceptions_that_name_the_option() -> None:
    with pytest.raises(ConfigErrors, match=r"job\.stepz .*did you mean") as caught:
        launcher.compose(["job.stepz=3", "model=gpt3"])
    assert [error.option for error in caught.value.errors] == ["model", "job.stepz"]
    with pytest.raises(ConfigErrors, match="measures no benchmark"):
        launcher.compose(["benchmark=activation"])
    with pytest.raises(ConfigError, match="give a list"):
        launcher.compose("job.steps=3")
    with pytest.raises(ConfigError, match="several runs"):
        launcher.compose(["+sweep=lr_batch"])
    with pytest.raises(ConfigErrors, match=r"job\.global_batch=3"):
        launcher.plan(launcher.compose(["job.global_batch=3"]))


def test_a_result_has_a_row_for_each_step_and_a_picture(tmp_path: Path) -> None:
    lines = [
        {"train/step": 0, "baseline/uniform": 7.6, "time": 1.0},
        {"train/step": 1, "train/loss": 7.5, "time": 2.0},
        {"train/step": 2, "train/loss": 7.0, "time": 3.0},
        {"train/step": 2, "eval/loss": 7.1, "time": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = launcher.Result(tmp_path)
    assert [row["train/step"] for row in result.rows()] == [0, 1, 2]
    assert (result.rows()[2]["train/loss"], result.rows()[2]["eval/loss"]) == (7.0, 7.1)
    assert result.metrics["eval/loss"] == 7.1
    assert result.curve().startswith(b"\x89PNG")
    assert result._repr_png_() is not None
    assert (result.status, result.failure) == ("submitted", None)
    (tmp_path / "result.json").write_text('{"status": "failed", "exit_code": 3}')
    assert (result.status, result.exit_code) == ("failed", 3)  # of a run that ended before this process began
    assert repr(result) == f"Result('{tmp_path}', status='failed')"
    nothing = launcher.Result(tmp_path / "none")
    assert nothing._repr_png_() is None
    assert (len(result.table()), len(nothing.table())) == (3, 0)


SCRIPT = """
import sys, launcher
result = launcher.run(launcher.compose(sys.argv[1:]))
print("status:", result.status, result.exit_code, sorted(path.name for path in result.folder.iterdir())[:3])
"""


def script(folder: Path, text: str) -> tuple[str, ...]:
    (folder / "script.py").write_text(text)
    return (sys.executable, "-P", str(folder / "script.py"))


def test_a_run_of_a_script_returns_its_result(launch: Launch, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    words = (*ECHO, f"job.input={prompts}", "job.max_tokens=2", "backend.ranks=1")
    ended = launch(*words, command=script(tmp_path, SCRIPT)).expect(0)
    assert "status: completed 0" in ended.stdout
    assert "run directory: " in ended.stdout


CHATTY = """
import signal, sys


def end(*_):
    print("x" * 2**20)  # more than a pipe holds
    sys.exit(5)


signal.signal(signal.SIGINT, end)
print("ready", flush=True)
while True:
    signal.pause()
"""


def test_a_starter_with_unread_output_is_ended() -> None:
    starter = StarterProcess({}, command=("-c", CHATTY))
    with pytest.raises(TimeoutError, match="not ended"):
        starter.print_until_end(timeout_s=0.01)
    while not starter._lines:
        time.sleep(0.01)
    starter.end()
    assert starter.exit_code == 5
    assert str(starter.error) == "the process that starts the run ended with exit code 5"


@pytest.mark.parametrize("error", [Unfit("no GPU"), EnvironmentProblem("no prctl")])
def test_an_error_of_the_starter_keeps_its_class(error: LauncherError) -> None:
    received = error_from_tree(json.loads(json.dumps(error_to_tree(error))))
    assert (type(received), str(received)) == (type(error), str(error))


def test_a_refusal_of_the_starter_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = launcher.compose(["job.global_batch=3", "tracker=local"])
    for is_waited in (True, False):
        with pytest.raises(launcher.ConfigErrors, match="global_batch=3") as caught:
            launcher.run(run, wait=is_waited)  # type: ignore[call-overload]
        (error,) = caught.value.errors
        assert (error.option, error.value) == ("job.global_batch", 3)
        assert error.fix
    with pytest.raises(launcher.ConfigErrors, match="only one combination"):
        launcher.sweep(["job.seed=1"])
    with pytest.raises(launcher.ConfigError, match="give a list"):
        launcher.sweep("job.seed=1,2")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_loaded_by_folder_and_by_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "gpt2" / "20260101-120000-abcd"
    folder.mkdir(parents=True)
    (folder / "run.yaml").touch()
    for result in (
        launcher.load(),
        launcher.load(folder),
        launcher.load("runs/gpt2/20260101-120000-abcd"),
        launcher.load("20260101"),
        launcher.load("gpt2", root=tmp_path / "runs"),
    ):
        assert (result.folder, result.status) == (folder, "submitted")
    with pytest.raises(launcher.ConfigError, match="no run in runs begins with it"):
        launcher.load("2025")


HANDLES = """
import gc, glob, os, sys, threading, time
import launcher

prompts = [word for word in sys.argv[1:] if word.startswith("job.input=")]
endless = launcher.compose(sys.argv[1:])
short = launcher.compose([*(word for word in sys.argv[1:] if word not in prompts), "job.input=short.txt"])
started = []  # from a thread that ends: the run must not end with it
thread = threading.Thread(target=lambda: started.append(launcher.run(short, wait=False)))
thread.start()
thread.join()
handle = started.pop()
print("after the start:", handle.status, handle.folder.is_dir())
print("short:", handle.wait().status, handle.status)


def start():
    handle = launcher.run(endless, wait=False)
    while not any(os.path.getsize(part) for part in glob.glob(f"{handle.folder}/generated/rank0.part")):
        time.sleep(0.05)
    return handle


cancelled = start()
print("cancelled:", cancelled.cancel().status, cancelled.status)
deleted = start()
result = launcher.load(deleted.folder)
print("loaded:", result.status)
del deleted
while result.status == "running":
    time.sleep(0.05)
print("deleted:", result.status)
left = start()
print("left:", left)
"""


def test_a_handle_is_waited_for_cancelled_deleted_and_left(launch_forked: Launch, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a\n")
    command = script(tmp_path, HANDLES)
    ended = launch_forked(*endless(tmp_path), "backend.ranks=1", command=command)  # it checks that nothing is left
    ended.expect(0)
    for line in (
        "after the start: running ",
        "short: completed completed",
        "cancelled: cancelled cancelled",
        "loaded: running",
        "deleted: cancelled",
        "status='running')",
    ):
        assert line in ended.stdout
    results = [json.loads(file.read_text())["status"] for file in tmp_path.glob("runs/*/*/result.json")]
    assert sorted(results) == ["cancelled"] * 3 + ["completed"]


SUBMITTED = """
from pathlib import Path
from launcher.api.messages import print_answer
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import SessionRecord, locate_this_process, write_session_file

record = SessionRecord(backend="slurm", session=locate_this_process(), job={{"id": "17"}})
write_session_file(RunDir(Path({folder!r})), record)
print_answer({{"folder": {folder!r}}})
"""


def test_a_submitted_run_is_cancelled_by_its_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scancel = tmp_path / "bin" / "scancel"
    scancel.parent.mkdir()
    scancel.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/cancelled\nexit $(/bin/cat {tmp_path}/code)\n')
    scancel.chmod(0o755)
    monkeypatch.setenv("PATH", str(scancel.parent))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.yaml").touch()
    handle = launcher.RunHandle(StarterProcess({}, command=("-c", SUBMITTED.format(folder=str(folder)))))
    assert handle.wait().status == "submitted"
    (tmp_path / "code").write_text("0")
    assert handle.cancel().status == "submitted"  # the scheduler ends it
    (tmp_path / "code").write_text("3")
    with pytest.raises(EnvironmentProblem, match="scancel ended with exit code 3"):
        handle.cancel()
    assert (tmp_path / "cancelled").read_text() == "-- 17\n" * 2


SWEEP = """
import sys, launcher
sweep = launcher.sweep(["job.seed=1,2", *sys.argv[1:]])
print("sweep:", [result.status for result in sweep.results], sweep.best, list(sweep.table()), sweep.rows()[1])
"""


def test_a_sweep_of_a_script_returns_its_results(launch_forked: Launch, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    words = (*ECHO, f"job.input={prompts}", "job.max_tokens=1", "backend.ranks=1")
    ended = launch_forked(*words, command=script(tmp_path, SWEEP)).expect(0)
    assert "trial 2/2: job.seed=2" in ended.stdout
    row = {"job.seed": "2", "status": "completed", "eval/loss": None}
    assert f"sweep: ['completed', 'completed'] None {list(row)} {row}" in ended.stdout


INTERRUPTED = """
import glob, os, signal, sys, threading, time
import launcher

def interrupt():
    while not any(os.path.getsize(part) for part in glob.glob("runs/*/*/generated/rank0.part")):
        time.sleep(0.05)
    os.kill(os.getpid(), {number})

threading.Thread(target=interrupt, daemon=True).start()
try:
    launcher.run(launcher.compose(sys.argv[1:]))
except KeyboardInterrupt:
    print("interrupted, and ended")
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_or_killed_script_leaves_no_process(
    launch_forked: Launch, tmp_path: Path, number: int, code: int
) -> None:
    command = script(tmp_path, INTERRUPTED.format(number=int(number)))
    ended = launch_forked(*endless(tmp_path), command=command).expect(code)  # it checks that nothing is left
    is_interrupt = number == signal.SIGINT
    assert ("interrupted, and ended" in ended.stdout) == is_interrupt
    (result,) = [json.loads(file.read_text()) for file in tmp_path.glob("runs/*/*/result.json")]
    assert (result["status"], result["exit_code"]) == ("cancelled", 128 + number)
