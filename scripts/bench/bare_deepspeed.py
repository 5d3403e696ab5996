"""A plain DeepSpeed training loop: the library's own documented shape, with numbers spelled out.

Started by the benchmarks, which set BENCH_STEPS, BENCH_METRICS and BENCH_ZERO_STAGE.
"""

from __future__ import annotations

import os

import deepspeed
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from workload import Workload, log_step


def main() -> None:
    """Train."""
    work = Workload(steps=int(os.environ["BENCH_STEPS"]))
    stage = int(os.environ["BENCH_ZERO_STAGE"])
    deepspeed.init_distributed(dist_backend="gloo")
    model = work.model()
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(work.parameter_groups(model), lr=work.lr, fused=True),
        config={
            "train_micro_batch_size_per_gpu": work.micro_batch,
            "gradient_accumulation_steps": work.accumulation,
            "gradient_clipping": work.clip_norm,
            "steps_per_print": 1_000_000,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 500_000_000, "overlap_comm": True},
        },
    )
    batches = work.micro_batches(dist.get_rank())
    for step in range(1, work.steps + 1):
        total = torch.zeros(())
        for _ in range(work.accumulation):
            ids = next(batches)
            logits = engine(input_ids=ids[:, :-1]).logits
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        log_step(step, total.item() / work.ranks / work.accumulation, float(engine.get_global_grad_norm()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
