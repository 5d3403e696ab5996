"""One rank, DDP, and FSDP2 with tensor or sequence parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.config.model.shape import Shape
from launcher.config.optimizer import Optimizer
from launcher.config.parallel.base import EngineKind, Parallel, ParallelDims, training_state
from launcher.config.precision import Precision
from launcher.errors import ConfigError
from launcher.protocol.plan import StateBytes


@dataclass(frozen=True, kw_only=True)
class _ReplicatedModel(Parallel):
    engine: ClassVar[EngineKind] = "torch"

    def state_bytes(self, shape: Shape, world_size: int, precision: Precision, *, moments: float = 2) -> StateBytes:
        """Return the bytes of fp32 weights, gradients and moments.

        Autocast's compute copies are short-lived.
        """
        return StateBytes.fp32(shape.num_params, moments=moments)

    def state_formula(self, world_size: int, precision: Precision, *, moments: float = 2) -> str:
        """Return the sum; nothing depends on the world size."""
        total = f"{8 + 4 * moments:.4g}N bytes, all in fp32 (ZeRO, arXiv:1910.02054, sec. 3.1)"
        return f"{training_state(moments)} = {total}"


@dataclass(frozen=True, kw_only=True)
class Single(_ReplicatedModel):
    """One rank, no communication: what every other strategy is compared with."""

    kind: ClassVar[str] = "single"
    max_ranks: ClassVar[int | None] = 1

    def validate_run(
        self, world_size: int, precision: Precision, *, optimizer: Optimizer, shape: Shape | None
    ) -> Iterator[ConfigError]:
        """Reject a world of several ranks."""
        if world_size != 1:
            yield ConfigError(
                "parallel", "single", why=f"the run has {world_size} ranks", fix="set parallel=ddp or backend.ranks=1"
            )


@dataclass(frozen=True, kw_only=True)
class Ddp(_ReplicatedModel):
    """Data parallel: gradients are averaged over ranks (Li et al., 2020, arXiv:2006.15704)."""

    kind: ClassVar[str] = "ddp"

    bucket_mb: int = 25
    """Size of gradient buckets, which are reduced during the backward pass."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject an empty bucket."""
        yield from self.validate_minimum(1, "bucket_mb")


def validate_heads(parallel: Parallel, option: str, shape: Shape) -> Iterator[ConfigError]:
    """Yield why the heads cannot be split over ``parallel.<option>`` ranks, with valid degrees.

    Tensor parallelism also divides the MLP. Sequence parallelism repeats heads of keys and values where there are
    fewer of them than ranks, so only the query heads must divide.
    """
    degree = getattr(parallel, option)
    sizes = {"heads": shape.num_attention_heads}
    if option == "tensor":
        sizes |= {"heads of keys and values": shape.num_key_value_heads, "MLP columns": shape.intermediate_size}
    uneven = {name: size for name, size in sizes.items() if size % degree}
    if degree == 1 or not uneven:
        return
    legal = [d for d in range(1, shape.num_attention_heads + 1) if not any(size % d for size in sizes.values())]
    below = max((d for d in legal if d < degree), default=1)
    above = min((d for d in legal if d > degree), default=None)
    choices = " or ".join(f"parallel.{option}={d}" for d in (below, above) if d is not None)
    why = f"the model's {', '.join(f'{size} {name}' for name, size in uneven.items())} are not multiples of it"
    yield parallel.error(option, why, f"set {choices}")


TENSOR_STYLES = frozenset({"colwise", "rowwise"})
"""Ways of slicing a matrix that the engine supports, in the words of Transformers' plans."""


@dataclass(frozen=True, kw_only=True)
class Fsdp(Parallel):
    """torch's fully_shard (arXiv:2304.11277), alone or with tensor or sequence parallelism.

    The world is replicate x shard x sequence x tensor; ``shard`` is what the others leave.
    """

    kind: ClassVar[str] = "fsdp"
    engine: ClassVar[EngineKind] = "torch"
    degree_options: ClassVar[tuple[str, ...]] = ("replicate", "sequence_parallel", "tensor")

    replicate: int = 1
    """Groups that hold the same shards: hybrid sharding (HSDP).
    Links within a group should be the fast ones."""

    tensor: int = 1
    """Ranks that split each matrix, by Transformers' plan for the model (arXiv:1909.08053)."""

    sequence_parallel: int = 1
    """Ranks that split each sequence, and the heads in attention (Ulysses, arXiv:2309.14509)."""

    offload: Literal["none", "cpu"] = "none"
    """Where shards, gradients and moments stay between uses: ``cpu`` keeps them in host RAM."""

    reshard_after_forward: bool = True
    """Free each layer's gathered parameters after its forward pass.
    ``false`` saves a gather in the backward pass, for more memory."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject degrees below 1, and two ways to cut attention at once."""
        yield from self.validate_minimum(1, "replicate", "tensor", "sequence_parallel")
        if self.sequence_parallel > 1 and self.tensor > 1:
            why = f"parallel.tensor={self.tensor} already splits the heads"
            yield self.error("sequence_parallel", why, "set parallel.sequence_parallel=1 or parallel.tensor=1")

    @property
    def needs_equal_shapes(self) -> bool:
        """Whether ranks share sequences, of which each takes an equal part."""
        return self.sequence_parallel > 1

    def dims(self, world_size: int) -> ParallelDims:
        """Return the degrees; ``shard`` takes the rest."""
        fixed = self.replicate * self.tensor * self.sequence_parallel
        shard = max(1, world_size // fixed)
        return ParallelDims(data=self.replicate, shard=shard, sequence=self.sequence_parallel, tensor=self.tensor)

    def state_bytes(self, shape: Shape, world_size: int, precision: Precision, *, moments: float = 2) -> StateBytes:
        """Return the bytes of a share of fp32 weights, gradients and moments.

        The layer that is gathered comes on top.
        """
        dims, blocks = self.dims(world_size), shape.num_hidden_layers * shape.block_params
        over = dims.shard * dims.sequence
        share = -(-blocks // (over * dims.tensor)) + -(-(shape.num_params - blocks) // over)
        return StateBytes.fp32(share, moments=moments, offloaded=self.offload == "cpu")

    def state_formula(self, world_size: int, precision: Precision, *, moments: float = 2) -> str:
        """Return the formula as text."""
        dims = self.dims(world_size)
        over = dims.shard * dims.sequence * dims.tensor
        whole = "; embeddings and head are whole on tensor ranks" if dims.tensor > 1 else ""
        return (
            f"({training_state(moments)}) / {over}, all in fp32 (FSDP, arXiv:2304.11277); "
            f"the current layer is gathered meanwhile{whole}"
        )

    def validate_run(
        self, world_size: int, precision: Precision, *, optimizer: Optimizer, shape: Shape | None
    ) -> Iterator[ConfigError]:
        """Reject heads that do not divide and models that Transformers has no tensor plan for."""
        dims = self.dims(world_size)
        if self.replicate > 1 and dims.shard * dims.sequence == 1:
            why = f"{dims} leaves one rank in each replica, so there is nothing to shard"
            yield self.error("replicate", why, "set parallel=ddp, or parallel.replicate=1")
        if shape is None:
            return
        if self.tensor > 1 and shape.family == "gpt2":
            why = "Transformers has no tensor plan for GPT-2: its attention keeps q, k and v in one matrix"
            yield self.error("tensor", why, "set parallel.tensor=1: the ranks then shard whole layers, or model=hf")
        for option in ("tensor", "sequence_parallel"):
            yield from validate_heads(self, option, shape)

    def warnings(self, precision: Precision, *, on_gpu: bool) -> Iterator[str]:
        """Say where offload moves nothing."""
        if self.offload == "cpu" and not on_gpu:
            yield "ranks compute on the CPU, so parallel.offload=cpu moves nothing off a device"
