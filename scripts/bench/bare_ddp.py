"""A plain torch DistributedDataParallel training loop, as one would write it without a framework.

Started by the benchmarks, which set BENCH_STEPS and BENCH_METRICS.
"""

from __future__ import annotations

import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from workload import Workload, log_step


def main() -> None:
    """Train."""
    work = Workload(steps=int(os.environ["BENCH_STEPS"]))
    dist.init_process_group("gloo")
    model = work.model()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(work.parameter_groups(model), lr=work.lr, fused=True)
    batches = work.micro_batches(dist.get_rank())
    for step in range(1, work.steps + 1):
        total = torch.zeros(())
        for micro in range(work.accumulation):
            ids = next(batches)
            last = micro == work.accumulation - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                logits = ddp(input_ids=ids[:, :-1]).logits
                loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / work.accumulation
                loss.backward()
            total += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), work.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        log_step(step, total.item() / work.ranks, grad_norm.item())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
