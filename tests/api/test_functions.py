"""The Python API: compose, plan, run, and what a result gives."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import launcher
from launcher.api import functions
from launcher.errors import ConfigError, ConfigErrors
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
    pipe = subprocess.PIPE
    starter = subprocess.Popen([sys.executable, "-c", CHATTY], stdin=pipe, stdout=pipe, text=True)
    assert starter.stdin is not None
    assert starter.stdout is not None
    starter.stdin.close()
    assert starter.stdout.readline() == "ready\n"
    functions._end(starter)
    assert starter.returncode == 5


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
    launch: Launch, tmp_path: Path, number: int, code: int
) -> None:
    command = script(tmp_path, INTERRUPTED.format(number=int(number)))
    ended = launch(*endless(tmp_path), command=command).expect(code)  # it checks that nothing is left
    is_interrupt = number == signal.SIGINT
    assert ("interrupted, and ended" in ended.stdout) == is_interrupt
    (result,) = [json.loads(file.read_text()) for file in tmp_path.glob("runs/*/*/result.json")]
    assert (result["status"], result["exit_code"]) == ("cancelled", 128 + number)
