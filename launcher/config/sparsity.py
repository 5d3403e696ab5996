"""The sparsity group: methods that set weights to zero, and the manifest of a pruned folder."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar, Literal

from launcher.config.component import Component
from launcher.errors import ConfigError
from launcher.utils.files import write_json
from launcher.utils.schema import to_tree
from launcher.utils.text import did_you_mean

UNSTRUCTURED = "unstructured"
DEFAULT_RATIO = 0.5
OWL_M, OWL_LAMBDA = 5.0, 0.08
"""Values of the paper for LLaMA-7B."""
_ROUNDING = 1e-6
"""0.29 of 100 weights are 29, though the product of the floats is 28.999999999999996."""


@dataclass(frozen=True, kw_only=True)
class Sparsity(Component):
    """Zeros in the matrices of a model's blocks.

    Embeddings, norms, biases and the output head stay.
    """

    group: ClassVar[str] = "sparsity"

    keep: bool = False
    """Keep the zeros of the loaded model's linear layers while it is trained (``job=train``)."""


@dataclass(frozen=True, kw_only=True)
class NoSparsity(Sparsity):
    """No weight is set to zero."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class GroupPattern:
    """N:M sparsity: of each group of consecutive inputs of an output, so many are not zero."""

    kept: int
    size: int

    @property
    def ratio(self) -> float:
        """Share of zeros."""
        return 1 - self.kept / self.size


def parse_pattern(text: str) -> GroupPattern | None:
    """Return the pattern that ``N:M`` names; ``None`` if the text is no such pattern."""
    kept, colon, size = text.partition(":")
    if not (colon and kept.isdecimal() and size.isdecimal()) or not 0 < int(kept) < int(size):
        return None
    return GroupPattern(kept=int(kept), size=int(size))


@dataclass(frozen=True, kw_only=True)
class Pruning(Sparsity):
    """A method that chooses the weights to set to zero."""

    summary_fields: ClassVar[tuple[str, ...]] = ("pattern",)

    ratio: float | None = None
    """Share of each matrix's weights that become zero.
    ``null`` is 0.5, or what ``pattern`` leaves out."""

    pattern: str = UNSTRUCTURED
    """``unstructured``, or ``N:M`` (2:4, 4:8): N weights of M consecutive inputs are not zero.
    In YAML files write it in quotes."""

    skip: tuple[str, ...] = ()
    """Layers not to prune, as name patterns: ``*.mlp.down_proj``, ``transformer.h.0.*``."""

    @property
    def groups(self) -> GroupPattern | None:
        """The N:M pattern; ``None`` if it is unstructured."""
        return parse_pattern(self.pattern)

    @property
    def zero_share(self) -> float:
        """Share of each matrix's weights that become zero."""
        if (groups := self.groups) is not None:
            return groups.ratio
        return DEFAULT_RATIO if self.ratio is None else self.ratio

    @abstractmethod
    def compared(self, outputs: int, inputs: int) -> int:
        """Return the least number of weights that an unstructured pattern ranks with each other."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject ratios and patterns that prune nothing or everything, or contradict each other."""
        yield from super().validate()
        if "" in self.skip:
            yield self.error("skip", "an empty pattern matches no layer", "leave it out")
        if self.ratio is not None and not 0 < self.ratio < 1:
            why = "leaves every matrix empty" if self.ratio >= 1 else "sets no weight to zero"
            yield self.error("ratio", f"{why}; it must be more than 0 and less than 1", "set sparsity.ratio=0.5")
        groups = self.groups
        if self.pattern != UNSTRUCTURED and groups is None:
            yield self.error("pattern", _why_no_pattern(self.pattern), "set sparsity.pattern=2:4, 4:8 or unstructured")
        elif groups is not None and self.ratio is not None and not math.isclose(self.ratio, groups.ratio):
            why = f"the pattern {self.pattern} sets 1 - {groups.kept}/{groups.size} = {groups.ratio:g} to zero"
            yield self.error("ratio", why, "leave it out, or set sparsity.pattern=unstructured")

    def selected(self, names: Sequence[str], *, family: str) -> list[str]:
        """Return the layers to prune: those that no pattern of ``skip`` matches.

        Args:
            names: of all matrices in the model's blocks.
            family: of the model, for messages.

        Raises:
            ConfigError: a pattern matches none, or nothing is left.
        """
        for pattern in self.skip:
            if not any(fnmatchcase(name, pattern) for name in names):
                why = f"{pattern!r} matches no linear layer of {family}"
                raise ConfigError("sparsity.skip", list(self.skip), why=why, fix=did_you_mean(pattern, list(names)))
        left = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in self.skip)]
        if not left:
            why = "the patterns match every layer"
            raise ConfigError("sparsity.skip", list(self.skip), why=why, fix="skip fewer layers")
        return left

    def validate_matrices(self, sizes: Mapping[str, tuple[int, int]], *, family: str) -> Iterator[ConfigError]:
        """Yield why matrices cannot be pruned so, before anything is loaded.

        Args:
            sizes: outputs and inputs of all matrices in the model's blocks, by name.
            family: of the model, for messages.
        """
        try:
            names = self.selected(list(sizes), family=family)
        except ConfigError as error:
            yield error
            return
        if (groups := self.groups) is not None:
            odd = [name for name in names if sizes[name][1] % groups.size]
            if odd:
                first, inputs = odd[0], sizes[odd[0]][1]
                why = f"{first} has {inputs} inputs, which groups of {groups.size} do not divide{_and_others(odd)}"
                fix = f"set sparsity.pattern=unstructured, or leave them with 'sparsity.skip=[\"{_skipping(odd)}\"]'"
                yield self.error("pattern", why, fix)
            return
        for share in self.shares:
            for wrong, why in ((0, "sets no weight to zero in"), (1, "leaves nothing of")):
                bad = [name for name in names if _leaves(wrong, self.compared(*sizes[name]), share)]
                if bad:
                    number = self.compared(*sizes[bad[0]])
                    text = f"{share:g} of {number} weights, rounded down, {why} {bad[0]}{_and_others(bad)}"
                    value = self.zero_share
                    yield ConfigError(
                        "sparsity.ratio", value, why=text, fix=f"set it to {'less' if wrong else 'more'}, as 0.5"
                    )
                    return

    @property
    def shares(self) -> tuple[float, ...]:
        """Smallest and largest share of zeros that a matrix may get."""
        return (self.zero_share,)


def num_zeros(number: int, share: float) -> int:
    """Return how many of ``number`` weights a share is, rounded down."""
    return math.floor(number * share + _ROUNDING)


def _leaves(wrong: int, number: int, share: float) -> bool:
    zeros = num_zeros(number, share)
    return zeros <= 0 if wrong == 0 else zeros >= number


def _and_others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more such layers)" if len(names) > 1 else ""


def _skipping(names: Sequence[str]) -> str:
    """Return a pattern that matches the first of these layers, in whichever block."""
    parts = names[0].split(".")
    number = next((at for at, part in enumerate(parts) if part.isdecimal()), None)
    return names[0] if number is None else f"*.{'.'.join(parts[number + 1 :])}"


def _why_no_pattern(text: str) -> str:
    if text.isdecimal():
        return "is a number: YAML reads 2:4 without quotes as 2 * 60 + 4"
    return "is not unstructured, nor N:M with N of at least 1 and less than M"


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruning):
    """Zeros for the smallest weights of each matrix (Han et al., 2015, arXiv:1506.02626)."""

    kind: ClassVar[str] = "magnitude"

    def compared(self, outputs: int, inputs: int) -> int:
        """Return the number of a matrix's weights."""
        return outputs * inputs


@dataclass(frozen=True, kw_only=True)
class CalibratedPruning(Pruning):
    """A method that needs the inputs of each layer, for text of the group ``data``."""

    summary_fields: ClassVar[tuple[str, ...]] = ("pattern", "calibration_sequences")

    allocation: Literal["uniform", "owl"] = "uniform"
    """Share of zeros of each block: the same, or by OWL (Yin et al., 2024, arXiv:2310.05175).
    OWL gives blocks with more outliers fewer zeros; the mean is ``ratio``."""

    owl_m: float | None = None
    """M of OWL: how many times the mean of ``|weight| * norm of its input`` an outlier is.
    ``null`` is 5."""

    owl_lambda: float | None = None
    """λ of OWL: shares of zeros of two blocks differ by at most twice this.
    ``null`` is 0.08."""

    calibration_sequences: int = 128
    """Training sequences of ``job.sequence_length`` tokens that layers are calibrated on."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject options of OWL without it, shares that it cannot spread, and no text."""
        yield from super().validate()
        yield from self.validate_minimum(1, "calibration_sequences")
        if self.allocation == "uniform":
            for field in ("owl_m", "owl_lambda"):
                if getattr(self, field) is not None:
                    yield self.error(field, "has no effect on a uniform allocation", "set sparsity.allocation=owl")
            return
        for field in ("owl_m", "owl_lambda"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                yield self.error(field, "must be more than 0", f"leave sparsity.{field} out")
                return
        if self.groups is not None:
            why = f"the pattern {self.pattern} gives every block the same share of zeros"
            yield self.error("allocation", why, "set sparsity.pattern=unstructured, or sparsity.allocation=uniform")
        low, high = self.shares
        if 0 < self.zero_share < 1 and not 0 < low <= high < 1:
            spread = self.spread
            why = f"shares of zeros may reach {self.zero_share:g} - {spread:g} = {low:.3g} "
            why += f"and {self.zero_share:g} + {spread:g} = {high:.3g}, and must be between 0 and 1"
            most = math.floor(500 * min(self.zero_share, 1 - self.zero_share) - _ROUNDING) / 1000
            fix = f"set sparsity.owl_lambda={most:g}" if most else "set sparsity.allocation=uniform"
            yield ConfigError("sparsity.owl_lambda", self.spread / 2, why=why, fix=fix)

    @property
    def spread(self) -> float:
        """Largest difference of two blocks' shares of zeros."""
        if self.allocation == "uniform":
            return 0.0
        return 2 * (OWL_LAMBDA if self.owl_lambda is None else self.owl_lambda)

    @property
    def shares(self) -> tuple[float, ...]:
        """Smallest and largest share of zeros that a matrix may get."""
        return (self.zero_share - self.spread, self.zero_share + self.spread)


@dataclass(frozen=True, kw_only=True)
class Wanda(CalibratedPruning):
    """Zeros for the smallest |weight| x norm of input, in each output (arXiv:2306.11695)."""

    kind: ClassVar[str] = "wanda"

    def compared(self, outputs: int, inputs: int) -> int:
        """Return the number of an output's weights."""
        return inputs


@dataclass(frozen=True, kw_only=True)
class SparseGpt(CalibratedPruning):
    """Zeros that cost least by the inverse Hessian; other weights make up (arXiv:2301.00774)."""

    kind: ClassVar[str] = "sparsegpt"

    block_size: int = 128
    """Inputs whose zeros are chosen together, before the weights after them are updated."""

    damping: float = 0.01
    """Share of the mean of the Hessian's diagonal that is added to the diagonal."""

    def compared(self, outputs: int, inputs: int) -> int:
        """Return the number of weights in the smallest block."""
        return outputs * (inputs % self.block_size or self.block_size if inputs > self.block_size else inputs)

    def validate(self) -> Iterator[ConfigError]:
        """Reject blocks that groups of a pattern do not fill, and a Hessian that has no inverse."""
        if self.block_size < 1:
            yield self.error("block_size", "must be at least 1", "set sparsity.block_size=128")
            return
        yield from super().validate()
        if self.damping <= 0:
            why = "must be more than 0: inputs that depend on each other leave the Hessian without an inverse"
            yield self.error("damping", why, "set sparsity.damping=0.01")
        groups = self.groups
        if groups is not None and self.block_size % groups.size:
            why = f"is no multiple of the {groups.size} weights of a group of {self.pattern}"
            yield self.error("block_size", why, f"set sparsity.block_size={32 * groups.size}")


PRUNING_METHODS: Mapping[str, type[Pruning]] = {method.kind: method for method in (Magnitude, Wanda, SparseGpt)}
"""Classes by the name that they have in options and files."""

SPARSITY_FILE = "sparsity.json"


def write_sparsity_manifest(folder: Path, method: Pruning, zeros: Mapping[str, float]) -> None:
    """Record in a model folder how its weights were pruned.

    Args:
        folder: of the weights, which hold the zeros themselves.
        method: by which.
        zeros: share of zeros of each pruned matrix, by the layer's name.
    """
    write_json(folder / SPARSITY_FILE, {**to_tree(method), "kind": method.kind, "layers": dict(zeros)})
