"""Attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from launcher.component import Component


@dataclass(frozen=True, kw_only=True)
class Attention(Component):
    """Which implementation computes attention; ``kind`` is the name Transformers knows it by."""

    group: ClassVar[str] = "attention"


@dataclass(frozen=True, kw_only=True)
class Sdpa(Attention):
    """torch's scaled-dot-product attention: a fused kernel where the machine has one."""

    kind: ClassVar[str] = "sdpa"


@dataclass(frozen=True, kw_only=True)
class Eager(Attention):
    """Plain matrix products; the scores are written out in full."""

    kind: ClassVar[str] = "eager"
