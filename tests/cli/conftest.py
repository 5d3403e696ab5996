"""Run directories for the verbs that act on runs: made up ones, and one that a real run left."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import ProcessLocation, SessionRecord, locate_this_process, write_session_file
from launcher.utils.files import write_json
from launcher.utils.processes import identify
from tests.conftest import MadeOnce, Start

SMALL = (
    "model.num_hidden_layers=2",
    "model.hidden_size=64",
    "model.max_position_embeddings=64",
    "job.sequence_length=32",
    "job.micro_batch=2",
    "job.eval_sequences=8",
    "job.sample_tokens=4",
    "job.log_every=1",
    "schedule.warmup_steps=2",
    "tracker=local",
)

Make = Callable[..., RunDir]


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make run directories below ``runs`` in a folder that is the current one from now on.

    ``status`` is what result.json says, ``None`` leaves it out; ``session`` is who runs it; ``age_s`` is the time since
    it was started.
    """
    monkeypatch.chdir(tmp_path)

    def make(
        run_id: str = "20260101-120000-abcd",
        *,
        name: str = "tiny",
        status: str | None = None,
        exit_code: int = 0,
        session: ProcessLocation | None = None,
        age_s: float = 1000.0,
        step: int | None = None,
        **fields: Any,
    ) -> RunDir:
        run_dir = RunDir(tmp_path / "runs" / name / run_id)
        run_dir.logs.mkdir(parents=True)
        run_dir.snapshot.write_text("job: {}\n")
        started_at = time.time() - age_s
        os.utime(run_dir.snapshot, (started_at, started_at))
        hosts = [{"host": {"name": "box", "slots": 2}}]
        plan = {"run_id": run_id, "name": name, "hosts": hosts, "work": {"num_steps": 10}, "grace_s": 1.0}
        write_json(run_dir.plan, plan)
        if session is not None:
            write_session_file(run_dir, SessionRecord(session=session, **{"backend": "local", **fields}))
        if step is not None:
            run_dir.metrics.write_text(f'{{"train/step": {step}, "train/loss": 2.5, "time": {time.time()}}}\n')
        if status is not None:
            result = {"status": status, "exit_code": exit_code, "run_id": run_id, "metrics": {"train/step": step}}
            write_json(run_dir.result, result)
        return run_dir

    return make


@pytest.fixture
def alive() -> ProcessLocation:
    """A process that runs: this one."""
    return locate_this_process()


@pytest.fixture
def gone(alive: ProcessLocation) -> ProcessLocation:
    """A process of this machine that has ended, and whose number another process has now."""
    return replace(alive, started=alive.started + 1)


@pytest.fixture
def far(alive: ProcessLocation) -> ProcessLocation:
    """A process of another machine with the number of one that runs here."""
    return replace(alive, machine="node7", boot="another")


@pytest.fixture
def child(alive: ProcessLocation) -> Iterator[tuple[subprocess.Popen[bytes], ProcessLocation]]:
    """A process that may be signalled."""
    with subprocess.Popen(["sleep", "600"]) as process:
        known = identify(process.pid)
        assert known is not None
        yield process, replace(alive, pid=known.pid, started=known.started)
        process.kill()


@pytest.fixture(scope="package")
def completed(made_once: MadeOnce, preloading: Start) -> Path:
    """A folder whose ``runs`` holds one real run of three steps that went well; to be read and not to be changed."""

    def fill(folder: Path) -> None:
        command = [sys.executable, "-m", "launcher", *SMALL, "job.steps=3"]
        with tempfile.TemporaryFile("w+") as output:
            ended = preloading(command, cwd=folder, env=dict(os.environ), stdout=output, stderr=output)
            code = ended.wait(300)
            output.seek(0)
            assert code == 0, output.read()

    return made_once("completed", fill)
