"""The example plugin: installed, run on this machine, and on two hosts that lack it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.protocol.results import read_metrics
from tests.conftest import REPOSITORY, Launch
from tests.plugins.conftest import EXAMPLE

SMALL = ("+exp=example", "job.steps=4", "job.eval_every=2", "job.log_every=1", "job.sample_tokens=4", "data.up_to=6000")


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
    assert metrics(found, "callback/weight_norm").keys() == {1, 2, 3, 4}
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


def test_a_job_of_the_example_runs(launch: Launch) -> None:
    words = ("plugins=[launcher_example]", "job=count_parameters", "model=gated_conv", "tracker=local")
    ended = launch(*words, "backend.ranks=1", env={"PYTHONPATH": str(EXAMPLE)}).expect(0)
    assert "gated_conv has 197,248 parameters" in ended.output


def test_the_example_keeps_the_contract_in_its_own_tests(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests")]
    env = {**os.environ, "PYTHONPATH": f"{EXAMPLE}:{REPOSITORY}"}
    ended = subprocess.run(
        [*command, "-c", "/dev/null", "--rootdir", str(tmp_path)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    assert "3 passed" in ended.stdout
