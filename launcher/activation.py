"""Activation checkpointing: which activations are recomputed instead of kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from launcher.component import Component


@dataclass(frozen=True, kw_only=True)
class Activation(Component):
    """A policy for the activations of transformer layers."""

    group: ClassVar[str] = "activation"


@dataclass(frozen=True, kw_only=True)
class Keep(Activation):
    """Keep every activation: fastest, most memory."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class Recompute(Activation):
    """Keep each layer's input and recompute the rest in the backward pass (Chen et al., 2016, arXiv:1604.06174)."""

    kind: ClassVar[str] = "full"
