"""Process groups of a run and collectives on them; without a group, for one process."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from launcher.data.rows import IGNORE_INDEX
from launcher.engines.loopback_store import join_store

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from launcher.config.parallel.base import ParallelDims
    from launcher.data.dataloader import MicroBatch
    from launcher.engines.context import Context


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""torch's names of the compute formats."""
_DAY_S = 86400.0
_AFTER_STALL_S = 300.0


def choose_device(local_rank: int) -> torch.device:
    """Return this rank's GPU, made current, or the CPU without one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def group_timeout(context: Context) -> timedelta:
    """Return the timeout of collectives, longer than the supervisor's, which knows the cause."""
    stall_s = context.run.backend.stall_timeout_s
    return timedelta(seconds=stall_s + _AFTER_STALL_S if stall_s else _DAY_S)


def use_master_port(port: int, *, world_size: int) -> None:
    """Have a forked rank join its next process group at another port than its parent's.

    Rank 0 listens there: torchrun's store, which serves the port it gave, knows nothing of it.
    """
    os.environ |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)


def connect(context: Context, device: torch.device) -> None:
    """Join the run's process group: NCCL for GPUs, Gloo for CPUs; a single rank joins none."""
    if context.world_size > 1:
        join_group(context, device, device_id=device if device.type == "cuda" else None)


def join_group(context: Context, device: torch.device, *, device_id: torch.device | None) -> None:
    """Join torch's process group, on one machine by a store that other machines do not reach."""
    rank, world_size, timeout = context.rank, context.world_size, group_timeout(context)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = join_store(rank=rank, world_size=world_size, timeout=timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    else:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
        )


def disconnect() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Sequence[float], *, device: torch.device) -> list[float]:
    """Return the sum of each value over all ranks."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    summed: list[float] = total.tolist()
    return summed


def from_main_rank(values: dict[str, float], *, device: torch.device) -> dict[str, float]:
    """Return the values of rank 0 by name, on every rank."""
    if not dist.is_initialized():
        return values
    both = [list(values), list(values.values())]
    dist.broadcast_object_list(both, src=0, device=device)
    return dict(zip(*both, strict=True))


def all_ranks_agree(answer: bool, *, device: torch.device) -> bool:
    """Whether every rank says yes."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return sum_over_ranks([float(answer)], device=device)[0] == world_size


def ranks_with_nonfinite(value: float, *, device: torch.device) -> tuple[int, ...]:
    """Return the ranks whose ``value`` is NaN or infinite."""
    return ranks_where(not math.isfinite(value), device=device)


def ranks_where(answer: bool, *, device: torch.device) -> tuple[int, ...]:
    """Return the ranks that say yes."""
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    flags = [0.0] * world_size
    flags[rank] = float(answer)
    return tuple(number for number, flag in enumerate(sum_over_ranks(flags, device=device)) if flag)


def share_partitions(partitions: Sequence[Tensor], group: ProcessGroup) -> None:
    """Fill each partition, in place, with that of the rank of its number.

    Gloo's all-gather would take as much memory as all partitions have.
    """
    for rank, partition in enumerate(partitions):
        dist.broadcast(partition.detach(), group=group, group_src=rank)


def num_labels(micro_batches: Sequence[MicroBatch]) -> int:
    """Return how many tokens of these batches count."""
    return sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in micro_batches)


def num_items(micro_batches: Sequence[MicroBatch]) -> int:
    """Return how many labelled tokens, or pairs, the loss of these batches is over."""
    return sum(num_pairs(batch) if batch.is_paired else num_labels([batch]) for batch in micro_batches)


def num_pairs(batch: MicroBatch) -> int:
    """Return how many pairs of a batch have labels."""
    chosen = batch.labels[: len(batch.labels) // 2]
    return int((chosen != IGNORE_INDEX).any(dim=1).sum())


class TokenCount:
    """Labelled tokens or pairs of the global batch, summed during the first forward pass.

    Args:
        micro_batches: of this rank.
        device: of the sum.
        copies: how many ranks are given the same tokens.
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], *, device: torch.device, copies: int = 1) -> None:
        self._total, self._copies = torch.tensor(num_items(micro_batches), device=device), copies
        self._work = dist.all_reduce(self._total, async_op=True) if dist.is_initialized() else None

    def total(self) -> torch.Tensor:
        """Return their number as an int64 scalar on the device, without synchronising."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            self._total //= self._copies
        return self._total


def mesh_of(dims: ParallelDims, *, device: torch.device) -> DeviceMesh:
    """Return the mesh of all ranks, with the parallel degrees above 1 as named dimensions.

    Every rank of the run calls it, once, after it has joined the process group.
    """
    named = dims.named()
    return init_device_mesh(device.type, tuple(named.values()), mesh_dim_names=tuple(named))


def submesh(mesh: DeviceMesh, *names: str) -> DeviceMesh | None:
    """Return ``mesh`` along ``names``, several flattened; ``None`` if none is a dimension."""
    there = tuple(name for name in names if name in (mesh.mesh_dim_names or ()))
    if not there or math.prod(mesh[name].size() for name in there) == 1:
        return None
    return mesh[there[0]] if len(there) == 1 else mesh[there]._flatten("_".join(there))  # noqa: SLF001
