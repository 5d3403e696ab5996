"""One rank that builds its part of a model, and says how much memory that took at most; started by build_memory.py."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from launcher.benchmarks.instruments import PeakMemory
from launcher.config.compose import compose
from launcher.engines.base import make_engine
from launcher.engines.context import Context
from launcher.engines.distributed import barrier, disconnect
from launcher.engines.model import build_run_model
from launcher.profiling.performance import StepClock
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.rundir import RunDir

CPU = torch.device("cpu")


def engine(context: Context) -> Callable[[], None]:
    """Make the engine of the run: connect the ranks and build what this one holds; nothing is optimised yet."""
    made = make_engine(context, StepClock(context.heartbeat, cuda=False))
    return made.close


def zero3(context: Context) -> Callable[[], None]:
    """Partition each part as it is built: what the engine does before ``initialize``, which makes optimizer state."""
    from launcher.config.parallel.zero import Zero
    from launcher.engines.deepspeed.base import connect_deepspeed, prepare_environment
    from launcher.engines.deepspeed.zero import ZeroPartitioner, assert_partitioned

    run, zero = context.run, context.run.parallel
    assert isinstance(zero, Zero), "the row names the strategy"
    config = zero.ds_config(
        batch=context.batch,
        clip_norm=0.0,
        optimizer=run.optimizer,
        precision=run.precision,
        native_adam=False,
    )
    prepare_environment(context)
    connect_deepspeed(context, device=CPU)
    partitioning = ZeroPartitioner(config, dtype=torch.float32)
    model = build_run_model(context, device=CPU, after=partitioning.partition)
    assert_partitioned(model, small=zero.persistence_threshold)

    def release() -> None:
        model.to_empty(device="meta")
        partitioning.release()
        disconnect()

    return release


BUILDERS: dict[str, Callable[[Context], Callable[[], None]]] = {"engine": engine, "zero3": zero3}
"""Each builds, and returns what frees it."""


def main() -> None:
    """Build a small model, so that all code is loaded; then the one to measure."""
    name, model, out, *overrides = sys.argv[1:]
    rank = int(os.environ["RANK"])

    def context_of(*words: str) -> Context:
        return Context(
            run=compose(words).run,
            run_dir=RunDir(Path(out).parent / "run"),
            rank=rank,
            local_rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            heartbeat=Heartbeat(None),
        )

    small = (
        "model=gpt2_tiny",
        "model.num_hidden_layers=4",
        "model.hidden_size=64",
        "model.num_attention_heads=2",
        "model.vocab_size=512",
    )
    build = BUILDERS[name]
    release = build(context_of(*small, *(word for word in overrides if not word.startswith("model.weights="))))
    barrier()
    release()
    # a second group that met in the same store would find the addresses of the first and wait indefinitely
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=os.environ["BENCH_PORT"])
    context = context_of(f"model={model}", *overrides)
    peak = PeakMemory(CPU)
    started = time.perf_counter()
    release = build(context)
    elapsed_s, above = time.perf_counter() - started, peak.above_before()
    kept = PeakMemory(CPU).before - peak.before
    Path(f"{out}.{rank}").write_text(json.dumps({"peak_bytes": above, "kept_bytes": kept, "build_s": elapsed_s}))
    barrier()
    release()


if __name__ == "__main__":
    main()
