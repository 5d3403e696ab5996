"""The same work by Hugging Face's Trainer; started by gpu_check.

BENCH_WORK holds the workload as JSON, BENCH_METRICS names the file of metrics.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from workload import Workload, log_step

from launcher.profiling.performance import peak_memory_bytes


class Sequences(Dataset):  # type: ignore[misc]
    """Random tokens, each sequence the same whenever it is asked for."""

    def __init__(self, work: Workload) -> None:
        self._work = work

    def __len__(self) -> int:
        """Return as many as the steps need."""
        return self._work.steps * self._work.accumulation * self._work.micro_batch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one; the model itself shifts labels by one, so it has one more label than is learnt."""
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self._work.vocab_size, (self._work.sequence_length,), generator=generator)
        return {"input_ids": ids, "labels": ids}


class Log(TrainerCallback):  # type: ignore[misc]
    """Writes a line a step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write what the Trainer logs after each step; what it sums up at the end has no loss of a step."""
        if logs and "loss" in logs:
            norm = float(logs.get("grad_norm", math.nan))
            log_step(
                state.global_step,
                float(logs["loss"]),
                norm,
                peak_bytes=peak_memory_bytes(cuda=torch.cuda.is_available()),
            )


def main() -> None:
    """Train."""
    work = Workload(**json.loads(os.environ["BENCH_WORK"]))
    os.environ.pop("RANK", None)  # the Trainer would look for the other ranks
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=work.steps,
            per_device_train_batch_size=work.micro_batch,
            gradient_accumulation_steps=work.accumulation,
            learning_rate=work.lr,
            weight_decay=work.weight_decay,
            max_grad_norm=work.clip_norm,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=work.precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=work.model(), args=arguments, train_dataset=Sequences(work), callbacks=[Log()]).train()


if __name__ == "__main__":
    main()
