"""Attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from launcher.component import Component
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.models.installed import AttentionMarks


@dataclass(frozen=True, kw_only=True)
class Attention(Component):
    """Which implementation computes attention."""

    group: ClassVar[str] = "attention"
    implementation: ClassVar[str]
    """What Transformers calls it."""


@dataclass(frozen=True, kw_only=True)
class Sdpa(Attention):
    """torch's scaled-dot-product attention: a fused kernel where the machine has one."""

    kind: ClassVar[str] = "sdpa"
    implementation: ClassVar[str] = "sdpa"


@dataclass(frozen=True, kw_only=True)
class Eager(Attention):
    """Plain matrix products; the scores are written out in full."""

    kind: ClassVar[str] = "eager"
    implementation: ClassVar[str] = "eager"


@dataclass(frozen=True, kw_only=True)
class Flash(Attention):
    """torch's flash kernel (Dao et al., 2022, arXiv:2205.14135) and no other: where it cannot run, the run ends."""

    kind: ClassVar[str] = "flash"
    implementation: ClassVar[str] = "launcher_sdpa"
    """Registered by ``launcher.models.kernels``. A name with ``flash`` in it would have Transformers look for the
    package flash-attn; one with ``sdpa`` has it check that the model can do without eager attention."""


@dataclass(frozen=True, kw_only=True)
class Flex(Attention):
    """torch's flex attention (Dong et al., 2024, arXiv:2412.05496), compiled at first use. Trains on GPUs only."""

    kind: ClassVar[str] = "flex"
    implementation: ClassVar[str] = "flex_attention"


def unsupported(attention: Attention, family: str, marks: AttentionMarks) -> ConfigError | None:
    """Return the refusal of a kernel that models of a family do not take, ``None`` where they do."""
    supports = {
        Eager.kind: True,
        Sdpa.kind: marks.sdpa,
        Flash.kind: marks.sdpa and marks.attention_backend,  # others would not find a kernel that is registered
        Flex.kind: marks.flex_attn,
    }
    if supports[attention.kind]:
        return None
    others = ", ".join(f"attention={kind}" for kind, supported in supports.items() if supported)
    why = f"{family} has no such attention in the installed Transformers"
    return ConfigError("attention", attention.kind, why=why, fix=f"set {others.replace(', ', ' or ')}")
