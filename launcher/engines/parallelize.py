"""Lay a model out over the ranks of the torch engine: DDP, or FSDP2 with tensor slices."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import CausalLMOutput

from launcher.config.model.image_text import is_image_text
from launcher.config.parallel.data_parallel import Ddp, Fsdp
from launcher.engines.distributed import DTYPES, mesh_of, submesh
from launcher.engines.model import build_run_model
from launcher.engines.tensor_parallel import TensorPlan
from launcher.engines.ulysses import SequenceParallel, check_cut
from launcher.models.layers import blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from launcher.engines.context import Context


class ModelLayout(Protocol):
    """A model on its ranks."""

    module: PreTrainedModel
    """The model itself."""
    forward: nn.Module
    """Module for forward passes in training."""
    averaged_over: int
    """Ranks over which the backward pass averages gradients; the loss is multiplied by it."""
    sequence: SequenceParallel | None
    """Sequence parallelism; ``None`` if sequences are not split."""
    casts_itself: bool
    """Whether gathered parameters are cast to the compute format, so autocast is not used."""

    def without_reduction(self) -> AbstractContextManager[None]:
        """Return a context in which gradients are only accumulated."""

    def gathered(self) -> AbstractContextManager[None]:
        """Return a context in which this rank holds the whole model."""

    def release(self) -> None:
        """Release what wraps the model."""


class ReplicatedModel:
    """The whole model on every rank; with several ranks, DDP averages the gradients."""

    sequence: SequenceParallel | None = None
    casts_itself = False

    def __init__(self, context: Context, device: torch.device) -> None:
        self.module: PreTrainedModel = build_run_model(context, device=device).to(device)
        self.forward: nn.Module = self.module
        self.averaged_over = context.world_size
        parallel = context.run.parallel
        if isinstance(parallel, Ddp) and context.world_size > 1 and context.run.batched_job.trains:
            self.forward = _replicated(self.module, bucket_mb=parallel.bucket_mb)

    def without_reduction(self) -> AbstractContextManager[None]:
        """DDP sets up its reduction in the forward pass, so that must be inside too."""
        if isinstance(self.forward, DistributedDataParallel):
            return cast("AbstractContextManager[None]", self.forward.no_sync())
        return contextlib.nullcontext()

    def gathered(self) -> AbstractContextManager[None]:
        """It always holds it."""
        return contextlib.nullcontext()

    def release(self) -> None:
        """Drop DDP."""
        self.forward = self.module


class ShardedModel:
    """FSDP2 over data and sequence ranks, a unit per block; matrices split over tensor ranks.

    Parts of the model are sliced and sharded as they are built, so no rank holds more than its share and one part.
    """

    def __init__(self, context: Context, device: torch.device) -> None:
        parallel = context.run.parallel
        assert isinstance(parallel, Fsdp), "the strategy that this lays out"
        self._parallel, self._device, self._precision = parallel, device, context.run.precision.compute
        self._length = context.run.batched_job.sequence_length
        self._mesh = mesh_of(context.dims, device=device) if context.world_size > 1 else None
        self._shards = self._shard_mesh()
        self.averaged_over = self._shards.size() if self._shards is not None else 1
        self.casts_itself = self._shards is not None
        self._plan: TensorPlan | None = None
        self.module: PreTrainedModel = build_run_model(
            context, device=device, after=self._shard_part, laid_out=self._read_plan
        )
        self._shard_rest()
        self.forward: nn.Module = self.module
        sequence = self._over("sequence")
        self.sequence = SequenceParallel(self.module, sequence.get_group()) if sequence is not None else None

    def _over(self, *names: str) -> DeviceMesh | None:
        return submesh(self._mesh, *names) if self._mesh is not None else None

    def _read_plan(self, model: PreTrainedModel) -> None:
        """Read the tensor plan and the blocks off the model before it has storage."""
        tensor, sequence = self._over("tensor"), self._over("sequence")
        if sequence is not None:
            check_cut(model, degree=sequence.size(), length=self._length)
        self._plan = TensorPlan(model, tensor) if tensor is not None else None
        self._blocks = set(map(id, blocks(model)))
        if is_image_text(model.config.to_dict()):  # features of images are views, which are not changed in place
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)

    def _shard_part(self, name: str, part: nn.Module) -> None:
        """Slice and shard one part.

        Embeddings and head are sharded with the root, which a tied weight must share.
        """
        if self._parallel.offload == "none" or self._shards is None:
            part.to(self._device)
        if self._plan is not None:
            self._plan.slice(name, part)
        if id(part) in self._blocks:
            self._shard(part)

    def _shard_rest(self) -> None:
        if self._parallel.offload == "none" or self._shards is None:
            self.module.to(self._device)
        self._shard(self.module)

    def _shard(self, module: nn.Module) -> None:
        if self._shards is None:
            return
        dtype = DTYPES[self._precision]
        policy = MixedPrecisionPolicy() if dtype == torch.float32 else _mixed(dtype)
        offload = self._parallel.offload == "cpu"
        fully_shard(
            module,
            mesh=self._shards,
            reshard_after_forward=self._parallel.reshard_after_forward,
            mp_policy=policy,
            offload_policy=CPUOffloadPolicy(pin_memory=self._device.type == "cuda") if offload else OffloadPolicy(),
        )

    def _shard_mesh(self) -> DeviceMesh | None:
        """Return the mesh to shard over: one dimension, or replicas of one (HSDP)."""
        within = self._over("shard", "sequence")
        if within is None or self._mesh is None or "data" not in (self._mesh.mesh_dim_names or ()):
            return within
        assert within.mesh_dim_names is not None, "a part of a mesh whose dimensions have names"
        return self._mesh["data", within.mesh_dim_names[0]]

    def without_reduction(self) -> AbstractContextManager[None]:
        """Keep gradients of whole layers until the last micro-batch, so that they are reduced once."""
        if isinstance(self.module, FSDPModule):
            return _unreduced(self.module)
        return contextlib.nullcontext()

    def gathered(self) -> AbstractContextManager[None]:
        """Gather all shards, and keep them until the end."""
        assert self._plan is None, "slices of matrices are never whole"
        assert self.sequence is None, "sequences are split"
        units = [each for each in self.module.modules() if isinstance(each, FSDPModule)]
        return _gathered(units, reshards=self._parallel.reshard_after_forward)

    def release(self) -> None:
        """FSDP2 has become part of the model: there is nothing to drop."""


def _mixed(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Gather and compute in ``dtype``, reduce gradients in fp32."""
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


@contextlib.contextmanager
def _unreduced(module: FSDPModule):  # type: ignore[no-untyped-def]
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


@contextlib.contextmanager
def _gathered(units: Sequence[FSDPModule], *, reshards: bool) -> Iterator[None]:
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(reshards, recurse=False)
            unit.reshard()


class _LogitsAlone(nn.Module):  # type: ignore[misc]  # torch is not followed
    """An image-text model whose output holds logits alone, so that DDP waits for no others.

    The last layer of an image encoder may have none: many models read the layer before.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.module(**inputs).logits)


def _replicated(module: PreTrainedModel, *, bucket_mb: int) -> DistributedDataParallel:
    """Return ``module`` under DDP.

    Buffers are constants and are not synchronised.
    """
    takes_images = is_image_text(module.config.to_dict())
    inner: nn.Module = _LogitsAlone(module) if takes_images else module
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # renamed in 2.13
    return DistributedDataParallel(
        inner,
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,
        find_unused_parameters=takes_images,
        **{buffers: False},
    )
