"""The example plugin: installed, run on this machine, and on two hosts that lack it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.protocol.results import read_metrics
from tests.conftest import REPOSITORY, Launch, RunProgram
from tests.plugins.conftest import EXAMPLE, WritePlugin

SMALL = ("+exp=example", "job.steps=4", "job.eval_every=2", "job.log_every=1", "job.sample_tokens=4", "data.up_to=6000")

CAREFUL = """
from launcher.training.callbacks import Callback

class Careful(Callback):
    def on_step(self, step, result):
        if step == 2 and self.context.rank == 1:
            raise ValueError(f"too large at step {step}")

    def on_exception(self, error):
        print(f"careful was given {type(error).__name__}", flush=True)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example into a folder, as ``pip install ./examples/plugin`` would."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(EXAMPLE)], check=True, timeout=120)
    return target


def metrics(run_dir: Path, name: str) -> dict[int, float]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return {int(line["train/step"]): line[name] for line in lines if line.get(name) is not None}


def test_the_installed_example_trains_with_all_that_it_adds(launch: Launch, installed: Path) -> None:
    words = (*SMALL, "backend.ranks=2", "checkpoint.at_end=true")
    ended = launch(*words, env={"PYTHONPATH": str(installed)}).expect(0)
    found = ended.run_dir
    assert "plugins:\n- launcher_example\n" in (found / "run.yaml").read_text()
    losses = metrics(found, "train/loss")
    assert losses[4] < losses[1]
    norms, changes = (metrics(found, f"callback/weight_norm{more}") for more in ("", "_change"))
    assert norms.keys() == {1, 2, 3, 4}
    assert changes[2] == pytest.approx(norms[2] - norms[1])
    assert metrics(found, "callback/steps_here") == {4: 4.0}
    assert metrics(found, "eval/accuracy").keys() == {2, 4}
    described = json.loads((found / "plan.json").read_text())["details"]
    assert described["transforms"] == "rms_norm (plugin example)"
    assert metrics(found, "callback/evaluations") == {2: 1.0, 4: 2.0}
    assert metrics(found, "callback/files")[4] > 3
    assert len((found / "losses.csv").read_text().splitlines()) == 5
    assert json.loads((found / "plan.json").read_text())["details"]["plugins"].startswith("example (")
    checkpoint = found / "checkpoints" / "step_00000004"
    resumed = launch(
        "plugins=[launcher_example]",
        *words,
        "job.steps=6",
        f"checkpoint.resume={checkpoint}",
        "parallel=ddp",
        "run.dir=on",
        env={"PYTHONPATH": str(installed)},
    ).expect(0)
    assert metrics(resumed.cwd / "on", "train/loss").keys() == {5, 6}
    assert metrics(resumed.cwd / "on", "callback/evaluations") == {6: 3.0}, "the checkpoint has the state"
    assert metrics(resumed.cwd / "on", "callback/steps_here") == {6: 2.0}
    evaluate = ("job=evaluate", "model=gated_conv", "data=counting", "data.up_to=6000", "job.sequence_length=64")
    named = ("job.metrics=[accuracy]", "job.transforms=[rms_norm]", f"checkpoint.resume={checkpoint}", "tracker=local")
    alone = launch(
        *evaluate, *named, "backend.ranks=1", "run.dir=alone", cwd=ended.cwd, env={"PYTHONPATH": str(installed)}
    ).expect(0)
    assert metrics(alone.cwd / "alone", "eval/accuracy") == {4: metrics(found, "eval/accuracy")[4]}


def test_a_callback_that_fails_on_one_rank_is_named(launch: Launch, write_plugin: WritePlugin, tmp_path: Path) -> None:
    word = write_plugin('Plugin(name="mine", executors={"callback": {"careful": "mine.parts:Careful"}})')
    (tmp_path / "mine" / "parts.py").write_text(CAREFUL)
    small = ("model.num_hidden_layers=1", "job.steps=5", "data=synthetic", "tracker=local", "job.sample_tokens=0")
    ended = launch(word, *small, "job.callbacks=[careful]", "backend.ranks=2", "run.dir=failed").expect(1)
    failure = json.loads((tmp_path / "failed" / "failure.json").read_text())
    assert failure["rank"] == 1
    named = "callback careful (plugin mine, plugins=[mine]), on_step: ValueError: too large at step 2"
    assert named in failure["reason"]
    assert "mine/parts.py" in failure["traceback"]
    assert "careful was given PluginError" in ended.output


def test_a_job_of_the_example_runs(launch: Launch) -> None:
    words = ("plugins=[launcher_example]", "job=count_parameters", "model=gated_conv", "tracker=local")
    ended = launch(*words, "backend.ranks=1", env={"PYTHONPATH": str(EXAMPLE)}).expect(0)
    assert "gated_conv has 197,248 parameters" in ended.output


def test_the_example_keeps_the_contract_in_its_own_tests(run_forked_program: RunProgram, tmp_path: Path) -> None:
    words = ("-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"), "-c", "/dev/null", "--rootdir", str(tmp_path))
    printed = run_forked_program("pytest", *words, cwd=tmp_path, PYTHONPATH=f"{EXAMPLE}:{REPOSITORY}")
    assert "31 passed" in printed
