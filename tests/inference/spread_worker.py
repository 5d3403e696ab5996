"""One rank of a model over several: the first serves and prints its results, the others follow."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

from torch import distributed as dist

from launcher.config.compose import compose
from launcher.config.inference import EngineLimits
from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.paged_engine import follow_paged_engine, make_paged_engine


def main() -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run = compose(["precision=fp32", "job=evaluate", "data=synthetic", *sys.argv[1:]]).run
    if world_size > 1:
        dist.init_process_group("gloo")
    limits = EngineLimits(max_num_seqs=3, kv_cache_tokens=1024 if rank else None, prefill_chunk_size=40)
    if run.parallel.dims(world_size).tensor > 1:  # drafts change no token
        limits = replace(limits, speculation="early_exit", speculation_layers=1, speculation_adaptive=False)
    if rank:
        follow_paged_engine(run, limits=limits, rank=rank, world_size=world_size, heartbeat=lambda: None)
        dist.destroy_process_group()
        return
    engine = make_paged_engine(run, limits=limits, rank=0, world_size=world_size, heartbeat=lambda: None)
    for index in range(20):
        way = SamplingParams(max_tokens=8, temperature=float(index % 2), seed=index, num_beams=1 + (index == 2))
        engine.add(EngineRequest(id=str(index), prompt=tuple(range(index, 3 * index + 2)), sampling=way))
    found: dict[str, list[int]] = {}
    while not engine.idle:
        for update in engine.step():
            found.setdefault(update.request_id, []).extend(token.id for token in update.tokens)
    assert (engine.stats().accepted_tokens_total > 0) == (limits.speculation != "none")
    engine.close()
    print("found", json.dumps(found, sort_keys=True), flush=True)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
