"""An engine's tensors as parts of whole ones, for checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from launcher.checkpoint.regions import Box, Region, whole
from launcher.checkpoint.tensors import Shard, StoredState
from launcher.engines.model_state import local_shard

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup


def region_of(tensor: Tensor) -> Region:
    """Return which part of the whole tensor this rank has."""
    if not isinstance(tensor, DTensor):
        return whole(tuple(tensor.shape))
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Box(tuple(offsets), tuple(sizes))


def shards_of(tensors: Mapping[str, Tensor]) -> list[Shard]:
    """Return the parts of tensors that this rank has, by the tensors' names."""
    found = ((name, tensor, region_of(tensor)) for name, tensor in tensors.items())
    return [shard_of(name, tensor, region) for name, tensor, region in found if region.numel]


def shard_of(name: str, tensor: Tensor, region: Region) -> Shard:
    """Return a part of a tensor, to be read when it is written."""

    def read() -> Tensor:
        return local_shard(tensor.detach())

    return Shard(name=name, shape=tuple(tensor.shape), region=region, dtype=tensor.dtype, read=read)


def divide_copies(shards: Sequence[Shard], group: ProcessGroup | None) -> list[Shard]:
    """Return the shards that this rank writes.

    Of equal parts that several ranks have, one rank writes each.

    Args:
        shards: that this rank has.
        group: of all ranks, on the CPU; ``None`` in a run of one.

    Returns:
        Shares of about equal bytes.
    """
    if group is None:
        return list(shards)
    world = dist.get_world_size(group)
    everyone: list[list[tuple[int, int]]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, [(_part_id(shard), shard.num_bytes) for shard in shards], group=group)
    holders: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for rank, parts in enumerate(everyone):
        for part, num_bytes in parts:
            holders.setdefault(part, []).append(rank)
            sizes[part] = num_bytes
    loads, owner = [0] * world, dict[int, int]()
    for part, ranks in holders.items():
        owner[part] = min(ranks, key=loads.__getitem__)
        loads[owner[part]] += sizes[part]
    here = dist.get_rank(group)
    return [shard for shard in shards if owner[_part_id(shard)] == here]


def _part_id(shard: Shard) -> int:
    """Return the same number on every rank for the same part of the same tensor."""
    return int.from_bytes(hashlib.blake2b(repr((shard.name, shard.region)).encode(), digest_size=8).digest())


def fill_tensors(tensors: Mapping[str, Tensor], source: StoredState) -> None:
    """Replace values in place by those of a checkpoint.

    Raises:
        ValueError: a tensor is missing or has another shape; nothing is replaced.
    """
    for name, tensor in tensors.items():
        check_shape(source, name, tuple(tensor.shape))
    regions = {name: region for name, tensor in tensors.items() if (region := region_of(tensor)).numel}
    source.expect(regions.items())
    for name, region in regions.items():
        source.read_into(local_shard(tensors[name].detach()), name, region)


def check_shape(source: StoredState, name: str, shape: tuple[int, ...]) -> None:
    """Raise unless the checkpoint has a tensor of this name and shape.

    Raises:
        ValueError: it is missing or has another shape.
    """
    found = source.shapes.get(name)
    if found != shape:
        raise ValueError(f"it has no {name}" if found is None else f"{name} has shape {found}, this model's {shape}")


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a model that belong to its weights, by name, sharing storage."""
    found = {}
    for path, owner in module.named_modules():
        for key, buffer in owner.named_buffers(recurse=False):
            if key not in owner._non_persistent_buffers_set:  # noqa: SLF001  (nothing else tells them apart)
                found[f"{path}.{key}" if path else key] = buffer
    return found


def saved_tensors(module: nn.Module, *, adapter_only: bool) -> dict[str, Tensor]:
    """Return the weights and buffers that checkpoints hold, by name, sharing storage.

    Args:
        module: the model.
        adapter_only: leave out all that is not trained.
    """
    parameters = {
        name: parameter.detach()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or not adapter_only
    }
    return parameters if adapter_only else parameters | persistent_buffers(module)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], *, state_names: Sequence[str]
) -> dict[str, Tensor]:
    """Return an optimizer's state by name (``exp_avg.<parameter>``), created if missing.

    Args:
        optimizer: whose state it is.
        names: of its parameters.
        state_names: of its state of each parameter; ``step`` is a scalar, the others have the parameter's shape. An
            optimizer with a method ``saved_state(parameter)`` has others, and that returns them by name.
    """
    saved_state = getattr(optimizer, "saved_state", None)
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if saved_state is not None:
                tensors |= {f"{name}.{names[parameter]}": tensor for name, tensor in saved_state(parameter).items()}
                continue
            state = optimizer.state[parameter]
            if not state:
                for name in state_names:
                    step = torch.zeros((), dtype=torch.float32, device=parameter.device) if name == "step" else None
                    state[name] = torch.zeros_like(parameter) if step is None else step
            tensors |= {f"{name}.{names[parameter]}": state[name] for name in state_names}
    return tensors


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """Return the states of this rank's random generators, as bytes, by name."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    states = {f"rng.{rank:05d}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"rng.{rank:05d}.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(source: StoredState, *, device: torch.device) -> None:
    """Set this rank's random generators; a rank that did not exist then keeps its own."""
    for name in rng_tensors(device):
        if name in source.shapes:
            state = source.read(name)
            if name.endswith(".cuda"):
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)
