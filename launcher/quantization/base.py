"""What every way to quantise answers without importing torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.component import Component
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Quantization(Component):
    """How the matrices in the blocks of a model are kept. Embeddings, norms, biases and the output head stay."""

    group: ClassVar[str] = "quantization"

    package: ClassVar[str | None] = None
    """The package that it needs."""

    skip: tuple[str, ...] = ()
    """Layers that stay as they are, as patterns of names: ``*.mlp.down_proj``, ``transformer.h.0.*``."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse patterns that are none."""
        if "" in self.skip:
            yield self.refuse("skip", "an empty pattern matches no layer", "leave it out")

    def preflight(self, option: str) -> Iterator[ConfigError]:
        """Yield a package that is not installed.

        Args:
            option: by which this method was chosen, as the user types it.
        """
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            fix = f"pip install 'launcher[quantize]', or set {option}=none"
            yield ConfigError(option, self.kind, why=f"the package {self.package} is not installed", fix=fix)


@dataclass(frozen=True, kw_only=True)
class NoQuantization(Component):
    """Weights stay in the format of ``precision``."""

    group: ClassVar[str] = "quantization"
    kind: ClassVar[str] = "none"
