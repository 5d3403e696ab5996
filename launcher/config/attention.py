"""Attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from launcher.config.component import Component


@dataclass(frozen=True, kw_only=True)
class Attention(Component):
    """Which implementation computes attention."""

    group: ClassVar[str] = "attention"
    implementation: ClassVar[str]
    """Name of the kernel in Transformers."""


@dataclass(frozen=True, kw_only=True)
class SdpaAttention(Attention):
    """torch's scaled-dot-product attention: a fused kernel where the machine has one."""

    kind: ClassVar[str] = "sdpa"
    implementation: ClassVar[str] = "sdpa"


@dataclass(frozen=True, kw_only=True)
class EagerAttention(Attention):
    """Plain matrix products; the scores are written out in full."""

    kind: ClassVar[str] = "eager"
    implementation: ClassVar[str] = "eager"


@dataclass(frozen=True, kw_only=True)
class FlashAttention(Attention):
    """torch's flash kernel (Dao et al., 2022, arXiv:2205.14135), without a fallback."""

    kind: ClassVar[str] = "flash"
    implementation: ClassVar[str] = "launcher_sdpa"
    """Name registered by ``launcher.models.attention``.
    A name with ``flash`` in it would have Transformers look for the package flash-attn; one with ``sdpa`` has it check
    that the model can do without eager attention."""


@dataclass(frozen=True, kw_only=True)
class FlexAttention(Attention):
    """torch's flex attention (Dong et al., 2024, arXiv:2412.05496), compiled at first use.

    Trains on GPUs only.
    """

    kind: ClassVar[str] = "flex"
    implementation: ClassVar[str] = "flex_attention"
