"""The ways to quantise that there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.errors import ConfigError
from launcher.quantization.base import Quantization

Name = Literal["none", "int8_dynamic", "int8_weight", "int4_weight", "fp8", "nf4"]
"""What ``model.quantization`` takes."""


@dataclass(frozen=True, kw_only=True)
class Int8Dynamic(Quantization):
    """8-bit matrices, a scale for each output, times 8-bit activations, scaled token by token (torchao)."""

    kind: ClassVar[str] = "int8_dynamic"
    package: ClassVar[str | None] = "torchao"


@dataclass(frozen=True, kw_only=True)
class Int8Weight(Quantization):
    """8-bit matrices, a scale for each output; products in the format of ``precision`` (torchao)."""

    kind: ClassVar[str] = "int8_weight"
    package: ClassVar[str | None] = "torchao"


@dataclass(frozen=True, kw_only=True)
class Int4Weight(Quantization):
    """4-bit matrices, a scale and a zero point for each group of inputs; products in the format of ``precision``."""

    kind: ClassVar[str] = "int4_weight"
    headline: ClassVar[tuple[str, ...]] = ("group_size",)

    group_size: int = 32
    """Inputs that share a scale; it divides the width of every layer that is quantised."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse groups that fill no bytes."""
        yield from super().problems()
        if self.group_size < 2 or self.group_size % 2:
            yield self.refuse("group_size", "two weights share a byte", "set quantization.group_size=32")


@dataclass(frozen=True, kw_only=True)
class Fp8(Quantization):
    """Matrices in float8 (e4m3), a scale for each output; products in the format of ``precision`` (torchao)."""

    kind: ClassVar[str] = "fp8"
    package: ClassVar[str | None] = "torchao"


@dataclass(frozen=True, kw_only=True)
class Nf4(Quantization):
    """4-bit NormalFloat, a scale for each 64 weights (Dettmers et al., 2023, arXiv:2305.14314; bitsandbytes)."""

    kind: ClassVar[str] = "nf4"
    package: ClassVar[str | None] = "bitsandbytes"


METHODS: Mapping[str, type[Quantization]] = {
    method.kind: method for method in (Int8Dynamic, Int8Weight, Int4Weight, Fp8, Nf4)
}
"""Classes by the name that they have in options and files."""


def method_named(name: Name) -> Quantization | None:
    """Return a method with its defaults; ``None`` for ``none``."""
    return None if name == "none" else METHODS[name]()
