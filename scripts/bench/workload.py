"""One training job, described once: as overrides for the launcher, and as plain torch for the bare scripts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Workload:
    """GPT-2, or Llama, on random weights; large enough that a step is far longer than what is measured around it."""

    family: Literal["gpt2", "llama"] = "gpt2"
    """The bare scripts know GPT-2 alone."""
    ranks: int = 2
    threads: int = 1
    layers: int = 4
    heads: int = 4
    width: int = 256
    vocab_size: int = 4096
    sequence_length: int = 128
    micro_batch: int = 8
    accumulation: int = 2
    steps: int = 20
    lr: float = 5e-4
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    precision: str = "fp32"

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step over all ranks."""
        return self.ranks * self.accumulation * self.micro_batch * self.sequence_length

    def overrides(self) -> list[str]:
        """Return this job in the launcher's words, with everything off that the bare scripts do not do."""
        return [
            f"model={self.family}_tiny",
            *(
                [f"model.num_key_value_heads={self.heads}", f"model.intermediate_size={4 * self.width}"]
                if self.family == "llama"
                else []
            ),
            f"model.num_hidden_layers={self.layers}",
            f"model.num_attention_heads={self.heads}",
            f"model.hidden_size={self.width}",
            f"model.vocab_size={self.vocab_size}",
            f"model.max_position_embeddings={self.sequence_length}",
            "data=synthetic",
            f"data.vocab_size={self.vocab_size}",
            f"precision={self.precision}",
            "schedule=constant",
            "schedule.warmup_steps=0",
            f"optimizer.lr={self.lr}",
            f"optimizer.weight_decay={self.weight_decay}",
            f"job.steps={self.steps}",
            f"job.micro_batch={self.micro_batch}",
            "job.global_batch=null",
            f"job.gradient_accumulation_steps={self.accumulation}",
            f"job.sequence_length={self.sequence_length}",
            f"job.clip_norm={self.clip_norm}",
            "job.eval_every=0",
            "job.eval_sequences=1",
            "job.sample_tokens=0",
            "checkpoint.every=0",
            "checkpoint.at_end=false",
            "tracker=local",
            f"backend.ranks={self.ranks}",
            f"backend.threads={self.threads}",
        ]

    def model(self) -> Any:
        """Return the same GPT-2 as a plain Transformers module."""
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=self.vocab_size,
            n_positions=self.sequence_length,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
        )
        return GPT2LMHeadModel(config).train()

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        """Return the parameters for AdamW: matrices decay, biases and norms do not."""
        matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        return [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]

    def micro_batches(self, rank: int) -> Iterator[Any]:
        """Yield token ids of shape (micro_batch, sequence_length + 1), without end."""
        import torch

        generator = torch.Generator().manual_seed(rank)
        while True:
            yield torch.randint(self.vocab_size, (self.micro_batch, self.sequence_length + 1), generator=generator)


def log_step(
    step: int, loss: float, grad_norm: float, *, peak_bytes: int | None = None, num_tokens: int | None = None
) -> None:
    """Append one JSON line to the file that the benchmark watches; only rank 0 writes."""
    if os.environ.get("RANK", "0") == "0":
        line: dict[str, float] = {"train/step": step, "train/loss": loss, "train/grad_norm": grad_norm}
        if peak_bytes is not None:
            line["memory/peak_bytes"] = peak_bytes
        if num_tokens is not None:
            line["num_tokens"] = num_tokens
        with Path(os.environ["BENCH_METRICS"]).open("a") as file:
            file.write(json.dumps(line) + "\n")
