"""Gradients summed over pipelines side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist
from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel


def sum_gradients(parameters: Sequence[nn.Parameter], group: ProcessGroup) -> None:
    """Replace each gradient by its sum over ``group``, many in one message; no gradient counts as zeros."""
    for bucket in _buckets(parameters):
        flat = torch.cat([_gradient(parameter).flatten() for parameter in bucket])
        dist.all_reduce(flat, group=group)
        parts = flat.split([parameter.numel() for parameter in bucket])
        torch._foreach_copy_([p.grad for p in bucket], [part.view_as(p) for p, part in zip(bucket, parts, strict=True)])


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        size += parameter.numel() * parameter.element_size()
        bucket.append(parameter)
        if size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
