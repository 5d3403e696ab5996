"""Number formats of a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.config.component import Component
from launcher.errors import ConfigError

FP8_MULTIPLE = 16
"""The units for 8-bit products take matrices whose sides are multiples of this."""


@dataclass(frozen=True, kw_only=True)
class Precision(Component):
    """Format of forward and backward passes; master weights and optimizer states stay fp32."""

    group: ClassVar[str] = "precision"
    compute: ClassVar[Literal["fp32", "bf16", "fp16"]]
    """The format that values have between matrix products."""

    min_compute_capability: ClassVar[tuple[int, int] | None] = None
    """First CUDA compute capability with matrix units for the format; ``None`` if any has them."""

    @property
    def compute_bytes(self) -> int:
        """Bytes of one value in the compute format."""
        return 4 if self.compute == "fp32" else 2

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield the packages that this machine lacks for the format."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class Fp32Precision(Precision):
    """Everything in 32-bit floating point."""

    kind: ClassVar[str] = "fp32"
    compute: ClassVar[Literal["fp32", "bf16", "fp16"]] = "fp32"


@dataclass(frozen=True, kw_only=True)
class Tf32Precision(Precision):
    """fp32 values with TensorFloat-32 matrix products (Ampere and later).

    TensorFloat-32 has the range of fp32 with 10 bits of mantissa.
    """

    kind: ClassVar[str] = "tf32"
    compute: ClassVar[Literal["fp32", "bf16", "fp16"]] = "fp32"
    min_compute_capability: ClassVar[tuple[int, int] | None] = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Bf16Precision(Precision):
    """bfloat16 compute: the range of fp32, so no loss scale."""

    kind: ClassVar[str] = "bf16"
    compute: ClassVar[Literal["fp32", "bf16", "fp16"]] = "bf16"


@dataclass(frozen=True, kw_only=True)
class Fp16Precision(Precision):
    """float16 compute with a dynamic loss scale (Micikevicius et al., 2018, arXiv:1710.03740)."""

    kind: ClassVar[str] = "fp16"
    compute: ClassVar[Literal["fp32", "bf16", "fp16"]] = "fp16"

    initial_scale_power: int = 16
    """The first loss scale is 2 to this power."""

    scale_window: int = 1000
    """Steps without overflow before the scale doubles."""

    hysteresis: int = 2
    """Overflows tolerated before the scale halves."""

    min_scale: float = 1.0
    """The scale never falls below this."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a scale that cannot work."""
        yield from self.validate_minimum(0, "initial_scale_power")
        yield from self.validate_minimum(1, "scale_window", "hysteresis", "min_scale")


@dataclass(frozen=True, kw_only=True)
class Fp8Precision(Precision):
    """8-bit products in the blocks' linear layers (torchao), with bf16 around them.

    Each tensor is scaled dynamically.

    Forward in e4m3, gradients in e5m2 (Micikevicius et al., 2022, arXiv:2209.05433); Ada and Hopper and later.
    """

    kind: ClassVar[str] = "fp8"
    compute: ClassVar[Literal["fp32", "bf16", "fp16"]] = "bf16"
    min_compute_capability: ClassVar[tuple[int, int] | None] = (8, 9)

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield a missing torchao."""
        if importlib.util.find_spec("torchao") is None:
            fix = "pip install 'launcher[fp8]', or set precision=bf16"
            yield ConfigError("precision", self.kind, why="the package torchao is not installed", fix=fix)
