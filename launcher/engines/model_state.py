"""A model's state on a rank: bytes it holds, local shards and whole parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launcher.protocol.plan import StateBytes

if TYPE_CHECKING:
    from torch import nn


def state_bytes(
    *,
    parameters: Iterable[Tensor | None],
    gradients: Iterable[Tensor | None],
    optimizer: Iterable[Tensor | None],
    device: torch.device,
) -> StateBytes:
    """Return the bytes of the tensors' storages by part, each storage counted once.

    Args:
        parameters: that forward passes use; DTensors count with this rank's shard.
        gradients: wherever they lie at the moment.
        optimizer: master weights, where there are any, and moments.
        device: where this rank computes: what lies in RAM beside a GPU is offloaded.
    """
    seen: set[tuple[torch.device, int]] = set()
    sizes: dict[str, int] = {}
    host = 0
    for part, tensors in (("parameters", parameters), ("gradients", gradients), ("optimizer", optimizer)):
        sizes[part] = 0
        for tensor in tensors:
            if tensor is None or (storage := local_shard(tensor).untyped_storage()).nbytes() == 0:
                continue
            place = (storage.device, storage.data_ptr())
            if place not in seen:
                seen.add(place)
                sizes[part] += storage.nbytes()
                host += storage.nbytes() if storage.device.type == "cpu" != device.type else 0
    return StateBytes(**sizes, host=host)


def torch_state_bytes(module: nn.Module, optimizer: torch.optim.Optimizer, *, device: torch.device) -> StateBytes:
    """Return the bytes of a model and torch's own optimizer."""
    return state_bytes(
        parameters=module.parameters(),
        gradients=(parameter.grad for parameter in module.parameters()),
        optimizer=_optimizer_tensors(optimizer),
        device=device,
    )


def deepspeed_state_bytes(engine: Any, *, device: torch.device) -> StateBytes:
    """Return the bytes of a model and its optimizer under DeepSpeed's ZeRO, without NVMe.

    Args:
        engine: DeepSpeed's.
        device: where this rank computes.
    """
    parameters: list[Any] = list(engine.module.parameters())
    outer = engine.optimizer
    inner = outer if isinstance(outer, torch.optim.Optimizer) else getattr(outer, "optimizer", outer)
    return state_bytes(
        parameters=[tensor for p in parameters for tensor in (p.data, getattr(p, "ds_tensor", None))],
        gradients=_deepspeed_gradients(parameters, outer, inner),
        optimizer=_optimizer_tensors(inner),
        device=device,
    )


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Yield the tensors that the optimizer updates, perhaps copies, and its state of each."""
    for updated, remembered in optimizer.state.items():
        yield updated
        yield from (value for value in remembered.values() if isinstance(value, Tensor))


def _deepspeed_gradients(parameters: Iterable[Any], outer: Any, inner: Any) -> Iterator[Tensor | None]:
    """Yield gradients wherever some stage keeps them between the backward pass and the update."""
    for parameter in parameters:
        yield parameter.grad
        yield getattr(parameter, "grad_accum", None)
    for averaged in getattr(outer, "averaged_gradients", {}).values():
        yield from averaged or ()
    yield getattr(outer, "grad_partitions_flat_buffer", None)
    yield from getattr(outer, "accumulated_grads_in_cpu", {}).values()
    yield from (updated.grad for updated in inner.state)


def whole_parameters(module: nn.Module, *, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield name and whole value of each parameter, in fp32 on the CPU; tied ones come once.

    Every rank that holds a share must go through all of them: each is gathered when its turn comes.

    Args:
        module: with parameters that are whole or DTensors.
        device: where the ranks talk to each other; offloaded shards are moved there first.
    """
    for name, parameter in module.named_parameters():
        value = parameter.detach()
        if isinstance(value, DTensor):
            value = value.to(device).full_tensor()
        yield name, value.to("cpu", torch.float32)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its storage; all of it if not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
