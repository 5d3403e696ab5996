"""Optimizers, and groups of parameters with options of their own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from launcher.config.component import Component
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.config.model.shape import Shape


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters, by a pattern of their names, that learn by options of their own."""

    pattern: str
    """Shell pattern of whole names: ``*.bias``, ``transformer.wte.weight``, ``*.h.0.*``."""

    lr_scale: float = 1.0
    """Factor on the learning rate of the step."""

    weight_decay: float | None = None
    """Weight decay of all of them, vectors too; ``null`` keeps the optimizer's rule."""

    def matches(self, name: str) -> bool:
        """Return whether the pattern matches the whole name of a parameter."""
        return fnmatchcase(name, self.pattern)


@dataclass(frozen=True, kw_only=True)
class Optimizer(Component):
    """How gradients become updates."""

    group: ClassVar[str] = "optimizer"

    state_names: ClassVar[tuple[str, ...]] = ()
    """Names of the state of each parameter in ``torch.optim.Optimizer.state``.

    ``step`` is a scalar, others have the parameter's shape. Without them only replicas (single, DDP) can save it."""

    lr: float = 1e-3
    """Peak learning rate; the schedule multiplies it."""

    weight_decay: float = 0.01
    """Decoupled decay, on matrices only: biases and norms do not decay."""

    groups: tuple[ParameterGroup, ...] = ()
    """Parameters, by patterns of their names, with options of their own; the first match counts.
    ``optimizer.groups=[{pattern:'*.bias',lr_scale:0.1,weight_decay:0}]``."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a negative rate or decay, and groups that change nothing."""
        if self.lr < 0:
            yield self.error("lr", "must be at least 0, and 0 trains nothing", "set optimizer.lr=1e-3")
        yield from self.validate_minimum(0, "weight_decay")
        for number, group in enumerate(self.groups):
            yield from self._validate_group(number, group)

    def _validate_group(self, number: int, group: ParameterGroup) -> Iterator[ConfigError]:
        option, what = f"optimizer.groups[{number}]", group.pattern or "''"
        if group.lr_scale < 0 or (group.weight_decay is not None and group.weight_decay < 0):
            why = "its lr_scale and weight_decay must be at least 0"
            yield ConfigError(option, what, why=why, fix="set lr_scale=0 to leave the parameters as they are")
        elif group.lr_scale == 1 and group.weight_decay is None:
            fix = "give it lr_scale or weight_decay, or leave it out"
            yield ConfigError(option, what, why="it changes nothing", fix=fix)
        earlier = [one for one in self.groups[:number] if one.pattern in (group.pattern, "*")]
        if earlier:
            why = f"optimizer.groups[{self.groups.index(earlier[0])}] ({earlier[0].pattern}) matches all of them first"
            yield ConfigError(option, what, why=why, fix="put it before that group, or leave it out")

    def group_without(self, number: int, trained: Collection[str]) -> ConfigError:
        """Return the error of a group that no parameter is in.

        Args:
            number: of the group.
            trained: names of the parameters that are trained.
        """
        own = self.groups[number]
        taken = any(own.matches(name) for name in trained)
        why = "earlier groups match all of its parameters" if taken else "it matches no parameter that is trained"
        example = ", ".join(sorted(trained)[:3])
        fix = f"name parameters that are trained, such as {example}, or leave the group out"
        return ConfigError(f"optimizer.groups[{number}]", own.pattern, why=why, fix=fix)

    def validate_groups(self, trained: Collection[str]) -> Iterator[ConfigError]:
        """Yield the groups that no parameter is in, by the names of those that are trained."""
        used = {self.group_of(name) for name in trained}
        yield from (self.group_without(number, trained) for number in range(len(self.groups)) if number not in used)

    def group_of(self, name: str) -> int | None:
        """Return the number of the first group whose pattern matches a parameter's name."""
        return next((number for number, group in enumerate(self.groups) if group.matches(name)), None)

    @property
    def saved_names(self) -> tuple[str, ...]:
        """Names of the state that checkpoints have of each parameter with these options."""
        return self.state_names

    @property
    def saves_shards(self) -> bool:
        """Whether its state can be saved where parameters are sharded."""
        return bool(self.state_names)

    @property
    def why_not_sharded(self) -> str:
        """Why its state cannot be saved where parameters are sharded, as text."""
        return "its class lists no state_names, by which shards of its state are saved"

    @property
    def why_not_flat(self) -> str:
        """Why it cannot run in DeepSpeed, which joins parameters in flat buffers, as text."""
        return "DeepSpeed updates flat buffers of several parameters"

    @property
    def trains_pipelines(self) -> bool:
        """Whether it works on the stages of a pipeline, which save its state by name."""
        return bool(self.state_names)

    def moments(self, shape: Shape) -> float:
        """Return the size of its state in fp32 tensors of the parameters' shapes.

        Adam's two where ``state_names`` is empty.
        """
        return len(set(self.saved_names) - {"step"}) if self.saved_names else 2

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield the errors that only this machine shows: missing packages."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class _Adam(Optimizer):
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running averages of the gradient and of its square."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject values outside AdamW's domain."""
        yield from super().validate()
        yield from self.validate_minimum(0, "eps")
        if not all(0 <= beta < 1 for beta in self.betas):
            yield self.error("betas", "each must be at least 0 and below 1", "set optimizer.betas=[0.9,0.999]")


@dataclass(frozen=True, kw_only=True)
class AdamW(_Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""

    kind: ClassVar[str] = "adamw"
    summary_fields: ClassVar[tuple[str, ...]] = ("lr", "betas", "weight_decay")
    state_names: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")

    implementation: Literal["auto", "torch", "native"] = "auto"
    """AdamW: ``torch`` (fused), ``native`` (DeepSpeed's operator) or ``auto``.
    ``auto`` takes native under DeepSpeed's offload; the run prints which one it took."""


_BLOCK, _BITSANDBYTES = 256, (0, 50)
"""Values that share a scale in bitsandbytes, and its first version that serves CPUs here."""


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(_Adam):
    """AdamW with moments in 8 bits, a scale for each block of 256 values (arXiv:2110.02861).

    By bitsandbytes. Parameters with fewer than 4096 values keep moments in fp32.
    """

    kind: ClassVar[str] = "adamw_8bit"
    summary_fields: ClassVar[tuple[str, ...]] = ("lr", "betas", "weight_decay")

    @property
    def why_not_sharded(self) -> str:
        """Blocks of scales would begin elsewhere."""
        return f"its blocks of {_BLOCK} values would begin elsewhere than in whole parameters, with other results"

    @property
    def why_not_flat(self) -> str:
        """As for shards."""
        return f"in DeepSpeed's flat buffers its blocks of {_BLOCK} values would mix parameters, with other results"

    @property
    def trains_pipelines(self) -> bool:
        """A stage has whole parameters."""
        return True

    def moments(self, shape: Shape) -> float:
        """Return two moments of a byte a value, and two fp32 scales a block."""
        return 2 * (1 + 4 / _BLOCK) / 4

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield that bitsandbytes is missing, or too old to compute on every device."""
        fix = "pip install 'launcher[quantize]', or set optimizer=adamw"
        if importlib.util.find_spec("bitsandbytes") is None:
            yield ConfigError("optimizer", self.kind, why="the package bitsandbytes is not installed", fix=fix)
            return
        version = importlib.metadata.version("bitsandbytes")
        if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < _BITSANDBYTES:
            needed = ".".join(map(str, _BITSANDBYTES))
            why = f"bitsandbytes {version} has no 8-bit update for CPUs, {needed} has"
            yield ConfigError("optimizer", self.kind, why=why, fix=f"pip install 'bitsandbytes>={needed}'")


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor: second moments of a matrix as a row and a column (arXiv:1804.04235); torch's.

    The step of a parameter is relative to its own size, and the rate at most ``1/sqrt(step)``. Where parameters are
    sharded, each rank gathers one matrix at a time and takes its step on the whole.
    """

    kind: ClassVar[str] = "adafactor"
    summary_fields: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")

    beta2_decay: float = -0.8
    """Exponent of the step in the decay of second moments, ``1 - step^beta2_decay``."""

    clip_threshold: float = 1.0
    """Largest root mean square of an update, before the learning rate."""

    min_scale: float = 1e-3
    """Least root mean square of a parameter that its step is relative to."""

    @property
    def why_not_flat(self) -> str:
        """Rows and columns are those of matrices."""
        return "DeepSpeed updates flat buffers, which have no rows and columns"

    @property
    def saves_shards(self) -> bool:
        """Rows and columns are whole on every rank."""
        return True

    @property
    def trains_pipelines(self) -> bool:
        """A stage has whole parameters."""
        return True

    def validate(self) -> Iterator[ConfigError]:
        """Reject values outside Adafactor's domain."""
        yield from super().validate()
        yield from self.validate_minimum(0, "min_scale")
        if self.beta2_decay > 0:
            yield self.error("beta2_decay", "must be at most 0", "set optimizer.beta2_decay=-0.8")
        if self.clip_threshold < 1:
            yield self.error("clip_threshold", "must be at least 1", "set optimizer.clip_threshold=1")

    def moments(self, shape: Shape) -> float:
        """Return the rows and columns of the embedding and of matrices as wide as the model."""
        return 2 / shape.hidden_size


@dataclass(frozen=True, kw_only=True)
class Muon(_Adam):
    """Muon: momentum orthogonalized, for matrices in blocks (arXiv:2502.16982), AdamW elsewhere.

    Embeddings, output head, biases and norms learn by AdamW. Where matrices are sharded, each rank keeps its share of
    the momentum, gathers one whole matrix at a time, and runs the Newton-Schulz iteration on that.
    """

    kind: ClassVar[str] = "muon"
    summary_fields: ClassVar[tuple[str, ...]] = ("lr", "momentum", "weight_decay")

    momentum: float = 0.95
    """Decay of the running average of the gradient of a matrix in a block."""

    nesterov: bool = True
    """Look one step of momentum ahead."""

    ns_steps: int = 5
    """Newton-Schulz iterations, in bf16."""

    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How the rate of a matrix of m rows and n columns follows from ``optimizer.lr``.
    ``match_rms_adamw``: 0.2·sqrt(max(m, n)) times it, so rates of AdamW fit; ``original``: sqrt(max(1, m/n))."""

    @property
    def why_not_flat(self) -> str:
        """The iteration is of matrices."""
        return "DeepSpeed updates flat buffers, and the Newton-Schulz iteration needs whole matrices"

    @property
    def saves_shards(self) -> bool:
        """Momentum is sharded as the weights."""
        return True

    @property
    def trains_pipelines(self) -> bool:
        """A stage has whole parameters, or shards of them."""
        return True

    def validate(self) -> Iterator[ConfigError]:
        """Reject values outside Muon's domain."""
        yield from super().validate()
        yield from self.validate_minimum(1, "ns_steps")
        if not 0 <= self.momentum < 1:
            yield self.error("momentum", "must be at least 0 and below 1", "set optimizer.momentum=0.95")
        if self.ns_steps >= 100:
            yield self.error("ns_steps", "must be below 100", "set optimizer.ns_steps=5")

    def moments(self, shape: Shape) -> float:
        """Return one moment for the parameters of blocks, and two for the others."""
        return 2 - shape.num_hidden_layers * shape.block_params / shape.num_params


@dataclass(frozen=True, kw_only=True)
class Sgd(Optimizer):
    """Stochastic gradient descent with momentum; torch's.

    Its weight decay is added to the gradient, so momentum averages it too.
    """

    kind: ClassVar[str] = "sgd"
    summary_fields: ClassVar[tuple[str, ...]] = ("lr", "momentum", "weight_decay")

    momentum: float = 0.9
    """Decay of the running sum of gradients; 0 keeps none."""

    nesterov: bool = False
    """Look one step of momentum ahead."""

    @property
    def saved_names(self) -> tuple[str, ...]:
        """Momentum, if there is any."""
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def why_not_flat(self) -> str:
        """Each value is treated by itself, and the state is not that of AdamW."""
        return "checkpoints of DeepSpeed's buffers hold AdamW's moments only"

    @property
    def saves_shards(self) -> bool:
        """Momentum is sharded as the weights."""
        return True

    @property
    def trains_pipelines(self) -> bool:
        """It treats each value by itself."""
        return True

    def validate(self) -> Iterator[ConfigError]:
        """Reject values outside its domain."""
        yield from super().validate()
        if not 0 <= self.momentum < 1:
            yield self.error("momentum", "must be at least 0 and below 1", "set optimizer.momentum=0.9")
        if self.nesterov and not self.momentum:
            yield self.error("nesterov", "optimizer.momentum=0 keeps no momentum to look ahead", "set it to false")

    def moments(self, shape: Shape) -> float:
        """Return one, or none without momentum."""
        return len(self.saved_names)
