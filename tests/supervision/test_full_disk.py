"""A disk of 6 MB that fills: what is said, what is left on it, and that the run still ends as one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.config.data.text import Text
from launcher.config.model.gpt2 import Gpt2
from launcher.data.token_cache import token_folder
from launcher.engines.deepspeed.nvme import SwapFolder
from launcher.errors import EnvironmentProblem, JobError
from launcher.protocol.heartbeat import create_heartbeat_file, heartbeat_file, map_heartbeat_file, read_exception_record
from launcher.protocol.metrics import MetricsWriter
from launcher.protocol.outcome import Failure, RunOutcome
from launcher.protocol.rundir import RunDir
from launcher.supervision.finalize import finalize_run
from launcher.utils.build_cache import build_once
from launcher.utils.files import atomic_file, read_json, write_atomic
from launcher.utils.system import describe_full_disk, disk_full_message
from tests.conftest import Launch
from tests.helpers import launch_verb

report = launch_verb("report")

SIZE = "6m"
SMALL = (
    *(
        "model.num_hidden_layers=2",
        "model.hidden_size=128",
        "model.max_position_embeddings=64",
        "tracker=local",
        "data=synthetic",
    ),
    *("job.sequence_length=32", "job.micro_batch=2", "job.eval_sequences=2", "job.sample_tokens=2"),
    *("job.log_every=1", "schedule.warmup_steps=2", "backend.ranks=1", "parallel=single"),
)
NAMED = re.compile(r"the disk of \S+ is full \((\d+ B|\d+\.\d+ KiB) of 6\.00 MiB free\)")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Mount a file system of 6 MB."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system of 6 MB cannot be mounted here (that needs root): {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def small(disk: Path) -> Iterator[Path]:
    """Return the disk with nothing on it."""
    yield disk
    subprocess.run(["find", disk, "-mindepth", "1", "-delete"], check=True)


def fill(disk: Path, *, leave: int = 0) -> None:
    """Leave only so many bytes."""
    with (disk / "ballast").open("wb") as file:
        free = os.statvfs(disk)
        file.write(bytes(free.f_bavail * free.f_frsize - leave))


def test_a_run_whose_checkpoints_fill_the_disk_says_so_restarts_and_leaves_room(
    launch_forked: Launch, small: Path
) -> None:
    words = ("job.steps=4", "checkpoint.every=1", "checkpoint.keep=0", "backend.restarts=1")
    ended = launch_forked(*SMALL, *words, f"run.dir={small / 'run'}").expect(1)
    run_dir = RunDir(small / "run")
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("exit code 1: rank 0 on ")
    assert NAMED.search(last)
    assert re.search(r"\(a checkpoint takes [\d.]+ MiB, and the run has up to 4 at a time: checkpoint.keep=0", last)
    assert "set run.dir to a folder on another disk" in last
    assert "Traceback" not in ended.output
    assert "restarting on" in ended.stdout
    assert NAMED.search(read_json(run_dir.path / "failure.before_restart_1.json")["reason"])
    assert NAMED.search(read_json(run_dir.failure)["reason"])
    assert read_json(run_dir.result)["status"] == "failed"
    assert list(run_dir.checkpoints.iterdir()) == [], "what could not be saved fills the disk no longer"
    assert describe_full_disk(small) is None


def test_a_run_that_cannot_even_begin_starts_nothing(launch_in_process: Launch, small: Path) -> None:
    (small / "run").mkdir()
    fill(small)
    refused = launch_in_process(*SMALL, f"run.dir={small / 'run'}").expect(2)
    assert refused.stderr.startswith(f"error: run.dir={small / 'run'} cannot be ")
    assert NAMED.search(refused.stderr)
    assert list((small / "run").iterdir()) == []


def test_the_end_is_said_where_nothing_can_be_written(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = RunDir(small / "run")
    run_dir.logs.mkdir(parents=True)
    fill(small)
    failure = Failure(
        host="a", rank=0, exit_code=7, signal=None, reason="rank 0 on a failed: why", log="a.0.log", time=0.0
    )
    finalize_run(RunOutcome(status="failed", exit_code=7, failure=failure), run_dir, run_id="x")
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1] == "exit code 7: rank 0 on a failed: why"
    assert said[0].startswith(f"{run_dir.failure} cannot be written: the disk of {run_dir.path} is full")
    assert said[1].startswith(f"{run_dir.result} cannot be written: ")
    finalize_run(RunOutcome(status="completed", exit_code=0), run_dir, run_id="x")
    assert f"{run_dir.result} cannot be written: " in capsys.readouterr().err
    assert sorted(path.name for path in run_dir.path.iterdir()) == ["logs"], "half a file fills the disk for nothing"


RANK = """
import os, sys
from pathlib import Path
from launcher.supervision.rank_monitor import run_rank as enter_rank
from launcher.protocol.rank_env import read_rank_env

def work(env, heartbeat):
    with open(env.run_dir.path / "ballast", "wb") as file:
        try:
            file.write(bytes(7_000_000))
        except OSError:
            pass
    for number in range(100_000):
        print("a line of the log", number, flush=True)

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LAUNCHER_HOST": "a"}
enter_rank(work, read_rank_env(Path(sys.argv[1]), os.environ))
"""


def test_a_rank_whose_log_fills_the_disk_ends_with_its_own_code_and_a_record(small: Path, tmp_path: Path) -> None:
    slot = heartbeat_file(tmp_path, 0)
    create_heartbeat_file(slot)
    env = {**os.environ, "LAUNCHER_AGENT_SCRATCH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", RANK, small / "run"], env=env, check=False, timeout=120)
    assert done.returncode == 1, "Python ends with 120 where its buffers cannot be written"
    payload = read_exception_record(map_heartbeat_file(slot))
    assert payload is not None, "no file took it"
    record = json.loads(payload)
    assert record["code"] == 1
    assert "No space left on device" in record["error"]


def metrics(disk: Path) -> None:
    with MetricsWriter(disk / "metrics.jsonl") as writer:
        for step in range(10_000):
            writer.record(step, loss=1.0)


def torchs_writer(disk: Path) -> None:
    import torch

    torch.save(torch.zeros(1 << 20), disk / "optimizer.pt")


def safetensors_writer(disk: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": __import__("numpy").zeros(1 << 20)}, disk / "model.safetensors")


@pytest.mark.parametrize("write", [metrics, torchs_writer, safetensors_writer])
def test_what_a_rank_cannot_write_names_the_disk(small: Path, write: Callable[[Path], None]) -> None:
    fill(small, leave=1 << 14)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (each library has an error of its own)
        write(small)
    said = disk_full_message(caught.value, {"run.root": small, "TMPDIR": Path("/")})
    assert said is not None
    assert NAMED.match(said)
    assert said.endswith("Free some space, or set run.root to a folder on another disk")


def test_a_swap_folder_without_room_is_named_before_deepspeed_aborts(small: Path) -> None:
    folder = SwapFolder(small / "nvme", run_id="x")
    folder.check_room()
    fill(small)
    with pytest.raises(JobError, match=NAMED) as refused:
        folder.check_room()
    assert "set parallel.nvme_path to a folder on another disk" in str(refused.value)
    folder.release()
    assert not folder.path.exists()


def test_other_errors_are_no_full_disk(small: Path) -> None:
    fill(small)
    assert disk_full_message(ValueError("a shape"), {"run.root": small}) is None
    assert disk_full_message(PermissionError(13, "Permission denied"), {"run.root": small}) is None


def test_a_quota_that_is_used_up_names_the_file(tmp_path: Path) -> None:
    error = OSError(122, "Disk quota exceeded", str(tmp_path / "model.safetensors"))
    said = disk_full_message(error, {"run.root": tmp_path})
    assert said is not None
    assert f"the disk of {tmp_path / 'model.safetensors'} was full, or its quota used up" in said


def test_a_cache_that_does_not_fit_is_removed_and_its_disk_named(small: Path) -> None:
    def tokenise(folder: Path) -> None:
        (folder / "tokens.arrow").write_bytes(bytes(7_000_000))

    with pytest.raises(EnvironmentProblem, match=NAMED) as refused:
        build_once(small / "cache" / "key", tokenise, heartbeat=lambda: None)
    assert "set XDG_CACHE_HOME to a folder on another disk" in str(refused.value)
    assert disk_full_message(refused.value, {"run.root": small}) == str(refused.value), "named twice, with two remedies"
    assert [path.name for path in (small / "cache").iterdir()] == ["key.lock"]
    assert describe_full_disk(small) is None


def test_the_cache_of_a_corpus_names_the_option_that_moves_it(small: Path) -> None:
    text = small / "text.txt"
    text.write_text("some words of text\n" * 2000)
    fill(small)
    model = Gpt2(name="x", num_hidden_layers=1, num_attention_heads=1, hidden_size=8)
    with pytest.raises(EnvironmentProblem, match=NAMED) as refused:
        token_folder(Text(path=str(text), cache=str(small / "cache")), model, heartbeat=lambda: None)
    assert str(refused.value).endswith("set data.cache to a folder on another disk")


def test_a_file_that_is_removed_again_names_the_option_of_its_folder(small: Path, tmp_path: Path) -> None:
    folders = {"run.dir": tmp_path / "run", "job.output": small, "TMPDIR": tmp_path}
    with pytest.raises(OSError, match="No space left") as caught, atomic_file(small / "out.jsonl") as file:
        file.write(bytes(7_000_000))
    assert describe_full_disk(small) is None, "there is room again"
    said = disk_full_message(caught.value, folders)
    assert said is not None
    assert said.startswith(f"the disk of {small / 'out.jsonl'} was full, or its quota used up")
    assert said.endswith("set job.output to a folder on another disk")


def test_a_report_that_does_not_fit_leaves_nothing(small: Path) -> None:
    run_dir = RunDir(small / "run")
    run_dir.path.mkdir()
    run_dir.snapshot.write_text("job:\n  kind: train\nmodel:\nbackend:\nrun:\n")
    fill(small)
    with pytest.raises(EnvironmentProblem, match=r"report\.html cannot be written: No space left on device"):
        report([str(run_dir.path)])
    assert [path.name for path in run_dir.path.iterdir()] == ["run.yaml"]


def test_an_answer_that_does_not_fit_leaves_the_old_one(small: Path) -> None:
    write_atomic(small / "answers.jsonl", "old")
    fill(small)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(small / "answers.jsonl", bytes(100_000))
    assert (small / "answers.jsonl").read_text() == "old"
    assert sorted(path.name for path in small.iterdir()) == ["answers.jsonl", "ballast"]


def test_a_run_whose_optimizer_state_does_not_fit_is_not_started(
    launch_in_process: Launch, small: Path, tmp_path: Path
) -> None:
    words = (*SMALL, "parallel=zero_infinity", f"parallel.nvme_path={small}", "parallel.pin_memory=false")
    refused = launch_in_process(*words, "run.dir=run").expect(2)
    said = (
        rf"nvme_path={small}: its disk has [56]\.\d\d MiB free, and optimizer state alone takes 7\.63 MiB; set parallel"
    )
    assert re.search(said, refused.stderr)
    assert list(tmp_path.iterdir()) == []


def test_what_dead_runs_left_on_nvme_takes_no_room_from_the_next(launch_in_process: Launch, small: Path) -> None:
    left = small / f"launcher-{os.geteuid()}-dead"
    alive = SwapFolder(small, run_id="alive")
    left.mkdir(mode=0o700)
    (left / "in_use").touch()
    (left / "optimizer.swp").write_bytes(bytes(4 << 20))
    words = (*SMALL, "parallel=zero_infinity", f"parallel.nvme_path={small}", "parallel.pin_memory=false")
    launch_in_process(*words, "run.dir=run", "dry_run=true").expect(0)
    assert left.exists(), "nothing starts"
    refused = launch_in_process(*words, "run.dir=run").expect(2)
    assert re.search(rf"nvme_path={small}: its disk has [56]\.\d\d MiB free, and optimizer state", refused.stderr)
    assert not left.exists()
    assert alive.path.is_dir(), "its lock is held"
    alive.release()
