"""The adapter group: small matrices trained beside frozen weights (LoRA and its variants)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from launcher.config.component import Component
from launcher.config.model.linear_layers import ModuleSizes
from launcher.errors import ConfigError
from launcher.utils.text import did_you_mean

ALL_LINEAR = "all-linear"
"""The value of ``adapter.targets`` for every linear layer in the blocks."""


@dataclass(frozen=True, kw_only=True)
class Adapter(Component):
    """What is trained besides, or instead of, the model's own weights."""

    group: ClassVar[str] = "adapter"


@dataclass(frozen=True, kw_only=True)
class NoAdapter(Adapter):
    """All weights of the model are trained."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """Low-rank matrices A and B beside frozen linear layers (Hu et al., 2021, arXiv:2106.09685).

    A layer's output is ``W x + alpha / r * B A x``.
    """

    kind: ClassVar[str] = "lora"
    summary_fields: ClassVar[tuple[str, ...]] = ("r", "alpha", "targets")
    is_dora: ClassVar[bool] = False
    is_rslora: ClassVar[bool] = False

    r: int = 16
    """Rank of the matrices."""

    alpha: float = 32.0
    """Scale of their product, divided by ``r`` (by its square root for ``rslora``)."""

    dropout: float = 0.0
    """Dropout of the inputs of A. 0 keeps runs equal on any number of ranks."""

    targets: str | tuple[str, ...] = ALL_LINEAR
    """Linear layers of the blocks that get one: ``all-linear``, or names and patterns.
    A name is the end of a layer's name (``q_proj``), a pattern matches the whole (``model.layers.1.*``)."""

    modules_to_save: tuple[str, ...] = ()
    """Other modules to train whole, by the end of their names (``lm_head``).
    They are saved with the adapter."""

    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A is drawn; B is zero, so training begins at the model itself.
    ``kaiming`` is PEFT's ``init_lora_weights=True``."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the model are trained too: none, all, or those of the target layers."""

    @property
    def scaling(self) -> float:
        """Factor of ``B A x``."""
        return self.alpha / (self.r**0.5 if self.is_rslora else self.r)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Return the targets as a list."""
        return (self.targets,) if isinstance(self.targets, str) else self.targets

    def validate(self) -> Iterator[ConfigError]:
        """Reject sizes that make no matrices, and empty names."""
        yield from self.validate_minimum(1, "r")
        if self.alpha <= 0:
            yield self.error("alpha", "must be above 0", "set adapter.alpha=32")
        if not 0 <= self.dropout < 1:
            yield self.error("dropout", "must be at least 0 and below 1", "set adapter.dropout=0")
        for field, example in (("targets", ALL_LINEAR), ("modules_to_save", "[lm_head]")):
            names = self.patterns if field == "targets" else self.modules_to_save
            if any(not name.strip() for name in names) or (field == "targets" and not names):
                yield self.error(field, "an empty name matches no layer", f"set adapter.{field}={example}")

    def error(self, field: str, why: str, fix: str) -> ConfigError:
        """Return the error for one option, a list as the user writes it."""
        value = getattr(self, field)
        shown = f"[{','.join(value)}]" if isinstance(value, tuple) else value
        return ConfigError(f"{self.group}.{field}", shown, why=why, fix=fix)

    def target_names(self, linear: Iterable[str]) -> list[str]:
        """Return the names of the layers that get matrices, in the order of the model.

        Args:
            linear: names of the linear layers in the model's blocks.

        Raises:
            ConfigError: a pattern matches none; it says which layers there are.
        """
        names = list(linear)
        for pattern in self.patterns:
            if not any(is_match(pattern, name) for name in names):
                why = f"{pattern!r} matches no linear layer in the blocks: there are {_endings(names)}"
                fix = did_you_mean(pattern, [*_ends_of(names), ALL_LINEAR])
                raise self.error("targets", why, fix)
        return [name for name in names if any(is_match(pattern, name) for pattern in self.patterns)]

    def saved_names(self, modules: Iterable[str]) -> list[str]:
        """Return the names of the modules that are trained whole.

        Args:
            modules: names of all modules of the model.

        Raises:
            ConfigError: a name matches none.
        """
        names = list(modules)
        for wanted in self.modules_to_save:
            if not any(_ends_with(wanted, name) for name in names):
                why = f"{wanted!r} is no module of the model: there are {_endings(names)}"
                raise self.error("modules_to_save", why, did_you_mean(wanted, _ends_of(names)))
        return [name for name in names if any(_ends_with(wanted, name) for wanted in self.modules_to_save)]

    def validate_modules(self, modules: ModuleSizes) -> Iterator[ConfigError]:
        """Yield names that no module has, that have two roles, or that would separate tied weights."""
        try:
            targets, whole = self.target_names(modules.linear), self.saved_names({**modules.others, **modules.linear})
        except ConfigError as error:
            yield error
            return
        if both := [name for name in whole if name in targets]:
            why = f"{both[0]} is one of adapter.targets, and would be trained in two ways"
            yield self.error("modules_to_save", why, "leave it out of one of the two")
        if tied := [name for name in whole if name in modules.tied]:
            why = f"{tied[0]} shares its weight with {', '.join(sorted(modules.tied - set(tied))) or 'the other'}"
            fix = "leave it out: embedding and output head are one matrix in this model"
            yield self.error("modules_to_save", f"{why}, and a trained copy would separate them", fix)

    def num_trained(self, modules: ModuleSizes) -> int:
        """Return the number of parameters that are trained."""
        targets = self.target_names(modules.linear)
        sizes = [modules.linear[name] for name in targets]
        count = sum(self.r * (size.inputs + size.outputs) + self.is_dora * size.outputs for size in sizes)
        if self.bias == "all":
            count += modules.num_biases
        elif self.bias == "lora_only":
            count += sum(size.outputs for size in sizes if size.has_bias)
        linear = {
            name: size.inputs * size.outputs + size.has_bias * size.outputs for name, size in modules.linear.items()
        }
        known = {**modules.others, **linear}
        return count + sum(known[name] for name in self.saved_names(known))

    def trained_names(self, modules: ModuleSizes, *, adapter: str) -> list[str]:
        """Return the names of the parameters that are trained.

        Args:
            modules: of the model.
            adapter: name of the adapter in the model.
        """
        targets, whole = self.target_names(modules.linear), self.saved_names({**modules.others, **modules.linear})
        parts = ("lora_A", "lora_B", *(["lora_magnitude_vector"] if self.is_dora else []))
        names = [f"{target}.{part}.{adapter}.weight" for target in targets for part in parts]
        names += [f"{name}.modules_to_save.{adapter}.{leaf}" for name in whole for leaf in modules.parameters_of(name)]
        biased = [name for name in (*modules.others, *modules.linear) if "bias" in modules.parameters_of(name)]
        if self.bias != "none":
            names += [f"{name}.base_layer.bias" for name in biased if name in targets]
        if self.bias == "all":
            names += [f"{name}.bias" for name in biased if name not in targets and name not in whole]
        return names

    def describe(self, modules: ModuleSizes | None, *, num_params: int | None) -> str:
        """Return what is trained, for the plan."""
        if modules is None or num_params is None:
            return f"{self.kind} on {', '.join(self.patterns)}: the layers are known once the model's files are here"
        targets, trained = self.target_names(modules.linear), self.num_trained(modules)
        total = num_params + trained
        text = (
            f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2g} %): {self.kind} r={self.r}"
        )
        text += f" on {len(targets)} layers ({_endings(targets)})"
        if whole := self.saved_names({**modules.others, **modules.linear}):
            text += f", whole: {_endings(whole)}"
        return text + (f", biases: {self.bias}" if self.bias != "none" else "")


@dataclass(frozen=True, kw_only=True)
class RsLora(Lora):
    """LoRA with ``alpha / sqrt(r)``, stable at large ranks (arXiv:2312.03732)."""

    kind: ClassVar[str] = "rslora"
    is_rslora: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Dora(Lora):
    """LoRA for directions, and a trained length for each output (arXiv:2402.09353)."""

    kind: ClassVar[str] = "dora"
    is_dora: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Qlora(Lora):
    """LoRA on quantized weights (Dettmers et al., 2023, arXiv:2305.14314).

    ``model.quantization`` says how; it is nf4 where it is not set.
    """

    kind: ClassVar[str] = "qlora"


QLORA_QUANTIZATION = "nf4"
"""What ``model.quantization`` becomes with ``adapter=qlora`` where it is ``none``."""


def is_match(pattern: str, name: str) -> bool:
    """Return whether a pattern of ``adapter.targets`` matches a linear layer's name."""
    return pattern == ALL_LINEAR or _ends_with(pattern, name) or fnmatchcase(name, pattern)


def _ends_with(wanted: str, name: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def shortest_targets(chosen: Sequence[str], linear: Iterable[str]) -> tuple[str, ...]:
    """Return the shortest value of ``adapter.targets`` that means these layers, in PEFT too.

    Args:
        chosen: names of layers.
        linear: names of all linear layers in the blocks.
    """
    ends = _ends_of(chosen)
    if sorted(name for name in linear if any(_ends_with(end, name) for end in ends)) == sorted(chosen):
        return tuple(ends)
    return tuple(chosen)


def _ends_of(names: Iterable[str]) -> list[str]:
    """Return the last parts of names, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _endings(names: Iterable[str]) -> str:
    return ", ".join(_ends_of(names))
