"""Optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.config.component import Component
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AdamW(Component):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""

    group: ClassVar[str] = "optimizer"
    kind: ClassVar[str] = "adamw"
    summary_fields: ClassVar[tuple[str, ...]] = ("lr", "betas", "weight_decay")

    lr: float = 1e-3
    """Peak learning rate; the schedule multiplies it."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running averages of the gradient and of its square."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    weight_decay: float = 0.01
    """Decoupled decay, on matrices only: biases and norms do not decay."""

    implementation: Literal["auto", "torch", "native"] = "auto"
    """AdamW: ``torch`` (fused), ``native`` (DeepSpeed's operator) or ``auto``.
    ``auto`` takes native under DeepSpeed's offload; the run prints which one it took."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject values outside AdamW's domain."""
        yield from self.validate_minimum(0, "lr", "eps", "weight_decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            yield self.error("betas", "each must be at least 0 and below 1", "set optimizer.betas=[0.9,0.999]")
