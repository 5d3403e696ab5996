"""A plain torch training loop on one device, as one would write it without a framework; started by gpu_check.

BENCH_WORK holds the workload as JSON, BENCH_METRICS names the file of metrics.
"""

from __future__ import annotations

import contextlib
import json
import os

import torch
from torch.nn.functional import cross_entropy
from workload import Workload, log_step

from launcher.profiling.performance import peak_memory_bytes


def main() -> None:
    """Train."""
    work = Workload(**json.loads(os.environ["BENCH_WORK"]))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    model = work.model().to(device)
    optimizer = torch.optim.AdamW(work.parameter_groups(model), lr=work.lr, fused=True)
    batches = work.micro_batches(0)
    half = work.precision == "bf16"
    for step in range(1, work.steps + 1):
        total = torch.zeros((), device=device)
        for _ in range(work.accumulation):
            ids = next(batches).to(device)
            with torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext():
                logits = model(input_ids=ids[:, :-1]).logits
                loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / work.accumulation
            loss.backward()
            total += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), work.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        log_step(step, total.item(), grad_norm.item(), peak_bytes=peak_memory_bytes(cuda=cuda))


if __name__ == "__main__":
    main()
