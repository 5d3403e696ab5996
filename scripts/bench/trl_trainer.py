"""The same fine-tuning by TRL's SFTTrainer; started by sft_beside_trl.py through accelerate.

BENCH_SFT holds the work as JSON, BENCH_METRICS names the file of metrics.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from workload import log_step

from launcher.profiling.performance import peak_memory_bytes


class Log(TrainerCallback):  # type: ignore[misc]
    """Writes a line a step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write what the Trainer logs after each step; what it sums up at the end has no loss of a step."""
        if logs and "loss" in logs:
            peak = peak_memory_bytes(cuda=torch.cuda.is_available())
            norm = float(logs["grad_norm"])
            log_step(
                state.global_step, float(logs["loss"]), norm, peak_bytes=peak, num_tokens=int(float(logs["num_tokens"]))
            )


def main() -> None:
    """Train."""
    work = json.loads(os.environ["BENCH_SFT"])
    on_cpu = not torch.cuda.is_available()
    torch.set_num_threads(work["threads"])
    lines = Path(work["rows"]).read_text(encoding="utf-8").splitlines()
    rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            output_dir=folder,
            max_steps=work["steps"],
            per_device_train_batch_size=work["micro_batch"],
            gradient_accumulation_steps=work["accumulation"],
            learning_rate=work["lr"],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=work["precision"] == "bf16",
            use_cpu=on_cpu,
            assistant_only_loss=True,
            packing=work["packed"],
            max_length=work["sequence_length"],
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32),
            args=arguments,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(work["model"]),
            peft_config=lora if work["adapter"] == "lora" else None,
            callbacks=[Log()],
        ).train()


if __name__ == "__main__":
    main()
