"""What gpu_check measures: the launcher by strategy, and others that do the same work."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness import step_times
from workload import Workload

from launcher.config.compose import compose
from launcher.config.folders import groups
from launcher.profiling.performance import peak_flops

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of doing the work."""

    overrides: tuple[str, ...] = ()
    """Of the launcher."""
    script: str | None = None
    """A program that does it without the launcher."""

    def missing(self) -> list[str]:
        """Return the overrides that choose an option this version does not have."""
        known = groups()
        chosen = (word.split("=", 1) for word in self.overrides if "." not in word.split("=", 1)[0])
        return [f"{group}={option}" for group, option in chosen if option not in known.get(group, ())]


@dataclass(kw_only=True)
class Found:
    """What was measured of a row."""

    tokens_per_s: list[float] = field(default_factory=list)
    peak_bytes: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    trouble: str = ""
    """Why there is no figure."""


def rows() -> dict[str, Row]:
    """Return the rows by name: the plain launcher, its peers, then one thing changed at a time."""
    return {
        "launcher": Row(),
        "bare torch loop": Row(script="bare_single.py"),
        "HF Trainer": Row(script="hf_trainer.py"),
        "compile": Row(overrides=("compile=true",)),
        "activation every_k": Row(overrides=("activation=every_k",)),
        "activation full": Row(overrides=("activation=full",)),
        "attention eager": Row(overrides=("attention=eager",)),
        "attention flash": Row(overrides=("attention=flash",)),
        "compile, flash": Row(overrides=("compile=true", "attention=flash")),
        "compile, activation full": Row(overrides=("compile=true", "activation=full")),
    }


def measure(
    chosen: Mapping[str, Row], work: Workload, *, rounds: int, skip: int, folder: Path, until: float
) -> dict[str, Found]:
    """Run all rows in turn, A B A B; one that fails keeps none of the others from being measured.

    Args:
        chosen: the rows.
        work: what each does.
        rounds: times each is run.
        skip: first steps, which are left out.
        folder: for the runs.
        until: ``time.monotonic()`` after which no run is started.
    """
    found = {name: Found() for name in chosen}
    numbers = itertools.count()
    for name, row in chosen.items():
        if missing := row.missing():
            found[name].trouble = f"this version has no {' '.join(missing)}"
    for round_ in range(1, rounds + 1):
        for name, row in chosen.items():
            here = found[name]
            if here.trouble:
                continue
            if time.monotonic() > until:
                print(f"  round {round_}: {name} not run: the time is up", flush=True)
                here.trouble = "" if here.tokens_per_s else "not run: the time was up"
                continue
            try:
                speed = _run(row, work, skip=skip, folder=folder / str(next(numbers)), into=here)
            except RuntimeError as error:
                here.trouble = _reason(str(error))
                print(f"  round {round_}: {name} failed: {error}", flush=True)
                continue
            print(f"  round {round_}: {name} {speed:,.0f} tokens/s", flush=True)
    return found


def _run(row: Row, work: Workload, *, skip: int, folder: Path, into: Found) -> float:
    metrics = folder / "metrics.jsonl"
    if row.script is None:
        launch = [sys.executable, "-m", "launcher", *work.overrides(), "parallel=single", *row.overrides]
        times = step_times([*launch, f"run.dir={folder}"], metrics=metrics, env={})
    else:
        folder.mkdir()
        env = {"BENCH_METRICS": str(metrics), "BENCH_WORK": json.dumps(asdict(work)), "RANK": "0"}
        env["OMP_NUM_THREADS"] = str(work.threads)
        times = step_times([sys.executable, str(HERE / row.script)], metrics=metrics, env=env)
    if len(times) != work.steps:
        raise RuntimeError(f"took {len(times)} steps of {work.steps}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    into.peak_bytes.append(max(line["memory/peak_bytes"] for line in steps))
    into.loss.append(steps[-1]["train/loss"])
    into.tokens_per_s.append(work.tokens_per_step * (len(times) - skip) / (times[-1] - times[skip - 1]))
    return into.tokens_per_s[-1]


def _reason(said: str) -> str:
    """Return the line of an output that tells most: that of the last error in it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line]
    return (errors or lines)[-1][:120]


def table(found: Mapping[str, Found], work: Workload, *, device_name: str | None) -> Iterator[str]:
    """Yield the Markdown table: median and range of tokens/s, MFU, the ratio to the launcher, peak memory, loss."""
    shape = compose(work.overrides()).run.model.shape()
    assert shape is not None, "GPT-2's sizes are known"
    flops = shape.flops_per_token(work.sequence_length)
    peak = None if device_name is None else peak_flops(device_name, precision=work.precision)
    plain = (
        statistics.median(found["launcher"].tokens_per_s)
        if "launcher" in found and found["launcher"].tokens_per_s
        else None
    )
    yield "| | tokens/s | MFU | against the launcher | peak memory (GB) | last loss |"
    yield "|---|---|---|---|---|---|"
    for name, here in found.items():
        if not here.tokens_per_s:
            yield f"| {name} | {here.trouble} | | | | |"
            continue
        speed = statistics.median(here.tokens_per_s)
        mfu = f"{speed * flops / peak:.1%}" if peak else f"no peak rate known of {device_name}"
        ratio = f"{speed / plain:.3f}" if plain else ""
        spread = f"{speed:,.0f} ({min(here.tokens_per_s):,.0f} to {max(here.tokens_per_s):,.0f})"
        most = f"{max(here.peak_bytes) / 1e9:.2f}"
        late = f"; then failed: {here.trouble}" if here.trouble else ""
        yield f"| {name} | {spread}{late} | {mfu} | {ratio} | {most} | {here.loss[-1]:.4f} |"
