"""One rank that saves or loads a checkpoint, and reports time and memory; started by checkpoint_memory.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from launcher.benchmarks.instruments import PeakMemory
from launcher.config.compose import compose
from launcher.engines.base import Engine, make_engine
from launcher.engines.context import Context
from launcher.engines.distributed import barrier
from launcher.profiling.performance import StepClock
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.rundir import RunDir

CPU = torch.device("cpu")


def save(engine: Engine, folder: Path) -> dict[str, float]:
    """Save all of the engine's state; return the seconds and the bytes of the largest tensor."""
    folder.mkdir(parents=True)
    largest = max(shard.num_bytes for shard in engine.shards())
    started = time.perf_counter()
    engine.save(folder)
    return {"save_s": time.perf_counter() - started, "largest_bytes": largest}


def load(engine: Engine, folder: Path) -> dict[str, float]:
    """Load; return the seconds, the peak above the level before, and what of it stays."""
    engine.shards()  # creates the moments, which are no part of what loading takes
    barrier()
    peak = PeakMemory(CPU)
    started = time.perf_counter()
    engine.load(folder)
    barrier()
    elapsed_s, above = time.perf_counter() - started, peak.above_before()
    return {"load_s": elapsed_s, "peak_bytes": above, "kept_bytes": PeakMemory(CPU).before - peak.before}


ACTIONS = {"save": save, "load": load}


def main() -> None:
    """Build an engine and do what the command line says; a process joins one group only, which DeepSpeed remembers."""
    what, model, folder, out, *overrides = sys.argv[1:]
    rank = int(os.environ["RANK"])
    context = Context(
        run=compose([f"model={model}", *overrides]).run,
        run_dir=RunDir(Path(folder) / "run"),
        rank=rank,
        local_rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        heartbeat=Heartbeat(None),
    )
    with make_engine(context, StepClock(context.heartbeat, cuda=False)) as engine:
        Path(f"{out}.{rank}").write_text(json.dumps(ACTIONS[what](engine, Path(folder) / "saved")))
        barrier()


if __name__ == "__main__":
    main()
