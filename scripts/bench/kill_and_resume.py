"""Kill a training run at random moments, resume it, and compare it with one that nothing disturbed.

    python scripts/bench/kill_and_resume.py [--kills 40] [--seed 0] [--strategies ddp,zero1,fsdp] [--folder DIR]

A kill is a SIGKILL of every process of the run, or of one rank, at a moment that the seed draws: during a step, while
the files of a checkpoint are written, between them and the manifest, at the rename, or while older checkpoints are
removed. ``launch resume`` then has to go on from the newest complete checkpoint, and every step has to have the
loss of the undisturbed run bit for bit. A loss of other samples would be another one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults_processes import MARK, marked

from launcher.checkpoint.store import complete_checkpoints, silent

STEPS = 14
WORDS = (
    *("model=gpt2_tiny", "data=synthetic", "tracker=local", "backend.ranks=2", "backend.threads=1"),
    *("model.hidden_size=128", "model.num_hidden_layers=4", "job.sequence_length=128", "job.micro_batch=4"),
    *(f"job.steps={STEPS}", "job.eval_every=0", "job.sample_tokens=0", "checkpoint.every=1", "checkpoint.keep=2"),
    *("checkpoint.async_mode=async", "backend.stall_timeout_s=60"),
)


@dataclass(frozen=True)
class Moment:
    """When to kill: at the first sight of a state of the checkpoint folder, once a step is done."""

    name: str
    seen: Callable[[Path], bool]


def _any(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None


MOMENTS = (
    Moment("compute", lambda folder: True),
    Moment("payload", lambda folder: _any(folder, ".step_*.tmp")),
    Moment("tensors written", lambda folder: _any(folder, ".step_*.tmp/state/rank_00001.safetensors")),
    Moment("manifest", lambda folder: _any(folder, ".step_*.tmp/manifest.json")),
    Moment("retention", lambda folder: _any(folder, ".step_*.gone")),
)


@dataclass(frozen=True)
class Kill:
    """One disturbance."""

    strategy: str
    moment: Moment
    step: int
    """Kill once so many steps are recorded."""
    later_s: float
    """And so much later than the moment is seen."""
    one_rank: bool


def draw(chance: random.Random, number: int, strategies: list[str]) -> Kill:
    """Return a kill; moments and strategies take turns, the rest is drawn."""
    return Kill(
        strategy=strategies[number % len(strategies)],
        moment=MOMENTS[number // len(strategies) % len(MOMENTS)],
        step=chance.randint(1, STEPS - 4),
        later_s=chance.choice((0.0, chance.uniform(0, 0.3))),
        one_rank=chance.random() < 0.5,
    )


def losses(run_dir: Path) -> dict[int, list[float]]:
    """Return every loss that was recorded for each step, in order; a half line counts as none."""
    found: dict[int, list[float]] = {}
    file = run_dir / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        record = json.loads(line)
        if "train/loss" in record:
            found.setdefault(int(record["train/step"]), []).append(record["train/loss"])
    return found


def start(folder: Path, words: list[str], mark: str) -> subprocess.Popen[bytes]:
    """Start the command with its output in a log."""
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", *words],
            cwd=folder,
            env={**os.environ, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(mark: str, *, one_rank: bool) -> None:
    """Kill one rank, or all processes of the run until none is left."""
    if one_rank:
        ranks = [seen for seen in marked(mark) if seen.rank == 1]
        for seen in ranks[-1:]:
            os.kill(seen.pid, signal.SIGKILL)
        return
    while alive := marked(mark):
        for seen in alive:
            try:
                os.kill(seen.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def disturb(planned: Kill, folder: Path, expected: dict[int, float], *, mark: str) -> str:
    """Start, kill, resume; return what is wrong, or an empty text."""
    run_dir = folder / "run"
    words = [*WORDS, f"parallel={planned.strategy}", f"run.dir={run_dir}"]
    process = start(folder, words, mark)
    deadline = time.monotonic() + 120
    while max(losses(run_dir), default=0) < planned.step:
        if process.poll() is not None or time.monotonic() > deadline:
            return "it was over before the kill"
    while not planned.moment.seen(run_dir / "checkpoints"):
        if process.poll() is not None:
            return "the moment did not come"
    time.sleep(planned.later_s)
    kill(mark, one_rank=planned.one_rank)
    process.wait(120)
    newest = next(complete_checkpoints(run_dir / "checkpoints", say=silent), None)
    if process.returncode == 0:
        return "" if losses(run_dir) == {step: [loss] for step, loss in expected.items()} else "it ended otherwise"
    resumed = start(folder, ["resume", str(run_dir)], mark)
    if code := resumed.wait(180):
        return f"launch resume ended with {code}"
    if left := marked(mark):
        return f"left: {[seen.command for seen in left]}"
    said = (folder / "log").read_text()
    if newest is not None and f"continuing after step {newest.manifest.step} of" not in said:
        return f"it did not go on from step {newest.manifest.step}"
    return "; ".join(differences(losses(run_dir), expected))


def differences(found: dict[int, list[float]], expected: dict[int, float]) -> Iterator[str]:
    """Yield the steps whose losses are missing or not equal to the bit, also where they were taken twice."""
    for step, loss in expected.items():
        if any(other != loss for other in found.get(step, [])) or step not in found:
            yield f"step {step}: {found.get(step)} and not {loss}"


def main() -> None:
    """Print a line for each kill; end with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", default="ddp,zero1,fsdp")
    parser.add_argument("--folder", type=Path, default=Path("kill_and_resume"))
    given = parser.parse_args()
    strategies, chance = given.strategies.split(","), random.Random(given.seed)
    given.folder.mkdir(parents=True)
    expected = {}
    for strategy in strategies:
        folder = given.folder.absolute() / strategy
        folder.mkdir()
        words = [*WORDS, f"parallel={strategy}", f"run.dir={folder / 'run'}"]
        if start(folder, words, f"kill-{strategy}").wait(300):
            sys.exit(f"the undisturbed run failed: {folder / 'log'}")
        expected[strategy] = {step: only for step, (only,) in losses(folder / "run").items()}
        assert sorted(expected[strategy]) == list(range(1, STEPS + 1)), "every step has a loss"
    wrong = 0
    print(f"seed {given.seed}")
    for number in range(given.kills):
        planned = draw(chance, number, strategies)
        folder = given.folder.absolute() / f"{number:03d}"
        folder.mkdir()
        error = disturb(planned, folder, expected[planned.strategy], mark=f"kill-{os.getpid()}-{number}")
        victim = "one rank" if planned.one_rank else "everything"
        what = f"{planned.strategy}, {planned.moment.name} + {planned.later_s * 1e3:.0f} ms after step {planned.step}"
        print(f"{number + 1:3d}  {what}, {victim}: {error or 'goes on'}", flush=True)
        wrong += bool(error)
        if not error:
            shutil.rmtree(folder)
    print(f"{given.kills - wrong} of {given.kills} go on as if nothing had happened")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
