"""What every benchmark here shares: who measured what, where and when, and A/B/A/B comparison of whole processes."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

BIN = Path(sys.executable).parent
POLL_S = 0.005


def describe_machine(*packages: str) -> str:
    """Return date, revision, machine and versions, so that a figure can be quoted with all that it depends on."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    said = subprocess.run(describe, capture_output=True, text=True, check=False)
    revision = said.stdout.strip() or "unknown: no git checkout"
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return "\n".join(
        (
            f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, revision {revision}",
            f"{_processor()}, {cores} cores, {memory_gib:.0f} GiB, load {os.getloadavg()[0]:.1f}",
            f"Python {platform.python_version()}, {versions}",
        )
    )


def print_machine(*packages: str) -> None:
    """Print what ``describe_machine`` returns."""
    print(describe_machine(*packages), flush=True)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def alternate(variants: Mapping[str, Callable[[], float]], *, rounds: int, unit: str) -> dict[str, float]:
    """Measure the variants in turn, A B A B, so that a slow minute of the machine hits all of them; return medians."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, measure in variants.items():
            value = measure()
            samples[name].append(value)
            print(f"  round {number + 1}: {name} {value:.3f} {unit}", flush=True)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    for name, values in samples.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{name}: median {medians[name]:.3f} {unit}, {spread}, n={len(values)}")
    return medians


def run_to_end(command: Sequence[str]) -> float:
    """Run a command, discard what it prints, and return its seconds.

    Raises:
        RuntimeError: it failed; the message holds the end of what it printed.
    """
    started = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if ended.returncode:
        printed = (ended.stdout + ended.stderr)[-3000:]
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{printed}")
    return seconds


def step_times(command: Sequence[str], *, metrics: Path, env: Mapping[str, str]) -> list[float]:
    """Run a command and return, for each step line of its ``metrics`` file, the seconds from start to its appearance.

    Seen from outside, by the same eyes for every program: nothing it does between steps goes uncounted.

    Raises:
        RuntimeError: it failed; the message holds the end of what it printed.
    """
    times: list[float] = []
    log = metrics.parent.with_suffix(".log")  # beside the run directory, which the launcher wants to make itself
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **env},
        )
        try:
            while process.poll() is None:
                _note_new_steps(metrics, times, time.perf_counter() - started)
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    _note_new_steps(metrics, times, time.perf_counter() - started)
    if process.returncode or not times:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return times


def _note_new_steps(metrics: Path, times: list[float], now: float) -> None:
    if not metrics.exists():
        return
    whole_lines = metrics.read_text().split("\n")[:-1]
    steps = sum("train/loss" in json.loads(line) for line in whole_lines)
    times.extend([now] * (steps - len(times)))
