"""Options of everything that this plugin adds: no torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from launcher.config.data.base import Corpus, TextChunk
from launcher.config.model.base import Model
from launcher.config.model.shape import Shape
from launcher.config.optimizer import Optimizer
from launcher.config.run import Job, Run
from launcher.config.schedule import Schedule
from launcher.config.tracker import Tracker
from launcher.errors import ConfigError
from launcher.protocol.plan import TrackerPlan


@dataclass(frozen=True, kw_only=True)
class GatedConv(Model):
    """A causal language model of gated convolutions (Dauphin et al., 2017, arXiv:1612.08083)."""

    kind: ClassVar[str] = "gated_conv"

    num_layers: int = 2
    """Blocks."""

    hidden_size: int = 64
    """Size of the residual stream."""

    kernel_size: int = 4
    """Tokens that one block sees: its own and those before it."""

    vocab_size: int = 2048
    """Rows of the embedding."""

    max_position_embeddings: int = 256
    """Longest sequence."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject sizes that make no model."""
        sizes = ("num_layers", "hidden_size", "kernel_size", "vocab_size", "max_position_embeddings")
        yield from self.validate_minimum(1, *sizes)

    def shape(self) -> Shape:
        """Return the sizes that plans calculate with."""
        width = self.hidden_size
        convolution = 2 * width * width * self.kernel_size
        block = 2 * width + convolution + 2 * width
        return Shape(
            num_hidden_layers=self.num_layers,
            num_attention_heads=1,
            num_key_value_heads=1,
            hidden_size=width,
            intermediate_size=2 * width,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            num_params=self.vocab_size * width + self.num_layers * block + 2 * width,
            largest_param=max(self.vocab_size * width, convolution),
            block_params=block,
            tie_word_embeddings=True,
            family=self.kind,
        )

    def architecture(self) -> dict[str, Any]:
        """Return what decides the shape of every parameter."""
        names = ("num_layers", "hidden_size", "kernel_size", "vocab_size")
        return {"family": self.kind, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Sign of a momentum (Chen et al., 2023, arXiv:2302.06675)."""

    kind: ClassVar[str] = "lion"
    summary_fields: ClassVar[tuple[str, ...]] = ("lr", "betas")
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg",)

    lr: float = 3e-4
    """Peak learning rate; a third to a tenth of AdamW's."""

    betas: tuple[float, float] = (0.9, 0.99)
    """Shares of the momentum in the update, and in the momentum itself."""

    embedding_lr_scale: float = 1.0
    """Multiplies the learning rate of the embedding."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject shares outside [0, 1) and a negative rate."""
        yield from super().validate()
        yield from self.validate_minimum(0, "embedding_lr_scale")
        if not all(0 <= beta < 1 for beta in self.betas):
            yield self.error("betas", "each must be at least 0 and below 1", "set optimizer.betas=[0.9,0.99]")


@dataclass(frozen=True, kw_only=True)
class Counting(Corpus):
    """Numbers in order, one document each hundred."""

    kind: ClassVar[str] = "counting"
    summary_fields: ClassVar[tuple[str, ...]] = ("up_to",)

    up_to: int = 20_000
    """The last number."""

    @property
    def source_option(self) -> str:
        """Return the option that decides the text."""
        return "data.up_to"

    def fingerprint(self) -> str:
        """Return what changes with the text."""
        return f"counting {self.up_to}"

    def local_pieces(self) -> Iterator[TextChunk]:
        """Yield the text."""
        for first in range(0, self.up_to, 100):
            numbers = range(first, min(first + 100, self.up_to))
            yield TextChunk(" ".join(map(str, numbers)) + "\n", ends_document=True)


@dataclass(frozen=True, kw_only=True)
class InverseSqrtSchedule(Schedule):
    """The inverse root of the step after warm-up (Vaswani et al., 2017, arXiv:1706.03762)."""

    kind: ClassVar[str] = "inverse_sqrt"

    final_factor: float = 0.1
    """The multiplier of the last step."""

    def decay(self, progress: float) -> float:
        """Return 1 at the end of the warm-up, ``final_factor`` at the end."""
        return float((1.0 + progress * (self.final_factor**-2 - 1.0)) ** -0.5)


@dataclass(frozen=True, kw_only=True)
class CountParameters(Job):
    """Print how many parameters the model has."""

    kind: ClassVar[str] = "count_parameters"

    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return the one step there is."""
        return 1

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield a line of the plan."""
        yield "counts", f"parameters of {run.model.name}"


@dataclass(frozen=True, kw_only=True)
class CsvTracker(Tracker):
    """A table of losses, ``losses.csv`` in the run directory."""

    kind: ClassVar[str] = "csv"

    def plan(self, run_id: str, *, environ: Mapping[str, str], home: Path, run_name: str) -> TrackerPlan:
        """Return a plan with a process beside the ranks."""
        return TrackerPlan(kind=self.kind, mode="offline", reason="losses.csv", run_id=run_id)
