"""The launcher keeps a checkpoint of another run from its choice until every rank has taken a step."""

from __future__ import annotations

import signal
from pathlib import Path

from launcher.checkpoint.locks import RemovalLock
from launcher.protocol.results import read_metrics
from launcher.protocol.rundir import RunDir
from tests.helpers import wait_for

SMALL = (
    *("model=gpt2_tiny", "data=synthetic", "tracker=local", "backend.ranks=2", "parallel=ddp", "job.micro_batch=2"),
    *("job.sequence_length=32", "job.eval_every=0", "job.eval_sequences=2", "job.sample_tokens=0", "job.log_every=1"),
)


def test_it_is_kept_until_the_ranks_have_loaded_it(launch, launch_in_background, tmp_path: Path) -> None:
    launch(*SMALL, "job.steps=1", "run.dir=first").expect(0)
    saved, second = tmp_path / "first" / "checkpoints" / "step_00000001", RunDir(tmp_path / "second")
    running = launch_in_background(*SMALL, "job.steps=100000", "model.weights=first", "run.dir=second")
    wait_for(second.plan.exists)

    def is_free() -> bool:
        with RemovalLock(saved) as lock:
            return lock.acquire()

    wait_for(is_free)
    assert any("train/loss" in line for line in read_metrics(second.metrics)), "it was free before the first step"
    running.send_signal(signal.SIGINT)
    assert running.wait() == 130
