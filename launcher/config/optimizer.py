"""Optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.config.component import Component
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optimizer(Component):
    """How gradients become updates."""

    group: ClassVar[str] = "optimizer"

    state_names: ClassVar[tuple[str, ...]] = ()
    """Names of the state of each parameter in ``torch.optim.Optimizer.state``.

    ``step`` is a scalar, others have the parameter's shape. Without them only replicas (single, DDP) can save it."""

    lr: float = 1e-3
    """Peak learning rate; the schedule multiplies it."""

    weight_decay: float = 0.01
    """Decoupled decay, on matrices only: biases and norms do not decay."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a negative rate or decay."""
        yield from self.validate_minimum(0, "lr", "weight_decay")

    @property
    def num_moments(self) -> int:
        """Tensors of a parameter's shape in its state; Adam's two if ``state_names`` is empty."""
        return len(set(self.state_names) - {"step"}) if self.state_names else 2


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""

    kind: ClassVar[str] = "adamw"
    summary_fields: ClassVar[tuple[str, ...]] = ("lr", "betas", "weight_decay")
    state_names: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running averages of the gradient and of its square."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    implementation: Literal["auto", "torch", "native"] = "auto"
    """AdamW: ``torch`` (fused), ``native`` (DeepSpeed's operator) or ``auto``.
    ``auto`` takes native under DeepSpeed's offload; the run prints which one it took."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject values outside AdamW's domain."""
        yield from super().validate()
        yield from self.validate_minimum(0, "eps")
        if not all(0 <= beta < 1 for beta in self.betas):
            yield self.error("betas", "each must be at least 0 and below 1", "set optimizer.betas=[0.9,0.999]")
