"""Activation checkpointing: which activations are recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.component import Component
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointing(Component):
    """A policy for the activations of transformer layers."""

    group: ClassVar[str] = "activation"


@dataclass(frozen=True, kw_only=True)
class NoCheckpointing(ActivationCheckpointing):
    """Keep every activation: fastest, most memory."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class FullCheckpointing(ActivationCheckpointing):
    """Keep each layer's input; recompute the rest in the backward pass (arXiv:1604.06174)."""

    kind: ClassVar[str] = "full"


@dataclass(frozen=True, kw_only=True)
class SelectiveCheckpointing(ActivationCheckpointing):
    """Recompute some layers and keep the others: less memory saved, less time lost."""

    kind: ClassVar[str] = "every_k"
    summary_fields: ClassVar[tuple[str, ...]] = ("k",)

    k: int = 2
    """Every k-th layer is recomputed, from the first one on; 1 recomputes all of them."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a step that leads nowhere."""
        yield from self.validate_minimum(1, "k")


@dataclass(frozen=True, kw_only=True)
class OffloadCheckpointing(ActivationCheckpointing):
    """Recompute each layer; keep the layers' inputs in page-locked host RAM until then."""

    kind: ClassVar[str] = "offload"
