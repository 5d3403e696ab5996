"""A W&B sweep drives the launcher: the real client and agent, the sweep file that ships, a server on loopback."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import yaml

from tests.conftest import REPOSITORY, Start

from .wandb_stub import KEY, serve

SHIPPED = REPOSITORY / "scripts" / "sweeps" / "wandb_lr.yaml"
SMALL = [
    "backend.ranks=1",
    "parallel=single",
    "job.steps=3",
    "model.num_hidden_layers=1",
    "job.eval_sequences=4",
    "job.sample_tokens=0",
    "job.sequence_length=32",
]


def wandb(*arguments: str, cwd: Path, url: str, start: Start) -> str:
    environ = {**os.environ, "WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"  # the sweep says `/usr/bin/env python`
    with (cwd / "wandb.txt").open("w+") as output:
        process = start([sys.executable, "-m", "wandb", *arguments], cwd=cwd, env=environ, stdout=output, stderr=output)
        try:
            code = process.wait(300)
        finally:
            process.kill()
        output.seek(0)
        said = output.read()
    assert code == 0, said
    return said


def test_each_trial_of_a_wandb_sweep_is_a_whole_run_under_the_agents_id(tmp_path: Path, preloading: Start) -> None:
    """The agent and its trials are forked from what has imported torch."""
    sweep = yaml.safe_load(SHIPPED.read_text())
    at = sweep["command"].index("job.steps=100")
    sweep["command"][at : at + 1] = SMALL
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with serve() as stub:
        stub.trials = [{"optimizer.lr": 1e-3, "job.global_batch": 16}, {"optimizer.lr": 2e-3, "job.global_batch": 32}]
        said = wandb("sweep", "sweep.yaml", cwd=tmp_path, url=stub.url, start=preloading)
        agent = re.search(r"wandb agent (\S+)", said)
        assert agent, said
        said = wandb("agent", agent[1], cwd=tmp_path, url=stub.url, start=preloading)
        assert set(stub.runs) == {"trial1", "trial2"}, said
        for number, (rate, batch) in enumerate(((1e-3, 16), (2e-3, 32)), start=1):
            run = stub.runs[f"trial{number}"]
            assert run.exit_code == 0
            assert run.project == "launcher"
            assert run.config["optimizer"]["value"]["lr"] == rate
            assert run.config["job"]["value"]["global_batch"] == batch
            assert [row["train/step"] for row in run.history if "train/loss" in row] == [1, 2, 3]
    assert len(list(tmp_path.glob("runs/*/*/result.json"))) == 2
