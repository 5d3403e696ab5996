"""What gpu_check checks besides speed: number formats that learn the same, and NCCL."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from harness import step_times
from workload import Workload

from launcher.config.folders import groups

HERE = Path(__file__).resolve().parent
SMALL = Workload(
    family="llama",  # fp8 converts Linear, which GPT-2 has none of
    ranks=1,
    layers=4,
    heads=8,
    width=512,
    vocab_size=1024,
    micro_batch=8,
    accumulation=1,
    steps=30,
)
TINY = replace(SMALL, layers=2, heads=2, width=64, vocab_size=512, sequence_length=32, micro_batch=2, steps=4)
TOLERANCE = {"tf32": 0.005, "fp8": 0.05}
"""Largest relative difference from the last loss in fp32: tf32 rounds to 11 significant bits, fp8 to 4."""


def losses(device: str, folder: Path) -> str:
    """Train a small model in fp32, tf32 and fp8 and compare the last losses."""
    work = SMALL if device == "cuda" else TINY
    formats = [name for name in TOLERANCE if name in groups()["precision"]]
    if device == "cpu":
        formats = []  # both are refused without a GPU
    if missing := [name for name in TOLERANCE if name not in formats]:
        left_out = f"; not run here: {', '.join(missing)}"
    else:
        left_out = ""
    reference = last_loss(replace(work, precision="fp32"), folder / "fp32")
    parts, failed = [f"fp32 {reference:.4f}"], False
    for name in formats:
        try:
            loss = last_loss(replace(work, precision=name), folder / name)
        except RuntimeError as error:
            return f"FAILED: {name}: {error}"
        apart = abs(loss - reference) / reference
        failed |= not apart <= TOLERANCE[name]  # a NaN is not within
        parts.append(f"{name} {loss:.4f} ({apart:.2%} apart, at most {TOLERANCE[name]:.1%})")
    return f"{'FAILED: ' if failed else ''}{', '.join(parts)}{left_out}"


def last_loss(work: Workload, folder: Path) -> float:
    """Return the loss of the last step of a run of the launcher."""
    command = [sys.executable, "-m", "launcher", *work.overrides(), "parallel=single", f"run.dir={folder}"]
    step_times(command, metrics=folder / "metrics.jsonl", env={})
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found: list[float] = [line["train/loss"] for line in lines if "train/loss" in line]
    return float("nan") if found[-1] is None else found[-1]


def collectives(device: str, folder: Path) -> str:
    """Start one rank by torchrun, whose collectives must give back what went in."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command = [*torchrun, str(HERE / "world_of_one.py"), device]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if ended.returncode:
        return f"FAILED: {(ended.stdout + ended.stderr).strip()[-500:]}"
    return ended.stdout.strip()


CHECKS: dict[str, Callable[[str, Path], str]] = {
    "losses by number format": losses,
    "a world of one": collectives,
}
"""Each returns what it found, which begins with FAILED where it should not be so."""
