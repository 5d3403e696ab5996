"""What every model configuration answers without importing torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from launcher.component import Component
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes the planner reckons with."""

    layers: int
    heads: int
    width: int
    vocab_size: int
    context: int
    """Longest sequence the model takes, in tokens."""
    num_params: int
    """Parameters, with tied ones counted once."""
    largest_param: int
    """Elements of the largest single parameter."""

    def flops_per_token(self, sequence_length: int) -> float:
        """Return forward-plus-backward FLOPs a token: 6N + 12·L·width·sequence (PaLM, arXiv:2204.02311, app. B)."""
        return 6.0 * self.num_params + 12.0 * self.layers * self.width * sequence_length


@dataclass(frozen=True, kw_only=True)
class Model(Component):
    """A causal language model, built from a configuration or loaded from weights."""

    group: ClassVar[str] = "model"

    name: str
    """What the model is called in plans, results and W&B; for ``hf``, the hub name or local folder."""

    weights: str = "random"
    """``random``, ``pretrained`` where the model has weights to load, or a local folder of safetensors."""

    @abstractmethod
    def shape(self) -> Shape | None:
        """Return the sizes, or ``None`` when they are only known once files are downloaded."""

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """Return what must be equal for a checkpoint of one run to fit another."""

    def preflight(self) -> Iterator[ConfigError]:
        """Yield what the file system says against this model, without importing torch."""
        yield from ()
