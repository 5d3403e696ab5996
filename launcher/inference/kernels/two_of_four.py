"""2:4 matrices without their zeros: of four consecutive inputs at most two are not zero."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 4
"""Consecutive inputs of an output of which two weights are kept."""
BLOCK = 16
"""Inputs whose indexes share a lane: the width of a matrix must be a multiple of this."""
_ROWS_AT_ONCE = 256


def is_two_of_four(matrix: Tensor) -> bool:
    """Return whether kernels can keep two of each four inputs, and lose nothing.

    Args:
        matrix: (out, in) of any numbers; a matrix of zeros alone was not pruned.
    """
    if matrix.ndim != 2 or matrix.shape[1] % BLOCK or not len(matrix):
        return False
    # most matrices are dense, which their first rows tell
    parts = (matrix[:1], *matrix.split(_ROWS_AT_ONCE))
    return all(bool((_kept(part).sum(-1) <= GROUP // 2).all()) for part in parts) and bool(matrix.any())


def compress(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kept weights and their indexes, (out, in / 2) each, in the order of inputs.

    Args:
        matrix: (out, in), for which :func:`is_two_of_four` holds. Where a group has fewer weights than two, zeros are
            kept too.

    Returns:
        The weights in the format of the matrix, and uint8 indexes from 0 to 3 within each group of four.
    """
    codes = (_kept(matrix) * torch.tensor([1, 2, 4, 8], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    indexes = _indexes()[codes.long()]  # out, groups, 2
    kept = matrix.unflatten(1, (-1, GROUP)).gather(-1, indexes)
    return kept.flatten(1), indexes.to(torch.uint8).flatten(1)


def decompress(values: Tensor, indexes: Tensor) -> Tensor:
    """Return the matrix (out, in) of what :func:`compress` returned."""
    groups = values.unflatten(1, (-1, 2))
    matrix = values.new_zeros((*groups.shape[:2], GROUP))
    return matrix.scatter_(-1, indexes.unflatten(1, (-1, 2)).long(), groups).flatten(1)


def _kept(matrix: Tensor) -> Tensor:
    """Return which weights are not zero, (out, groups, 4)."""
    return matrix.unflatten(1, (-1, GROUP)) != 0


@cache
def _indexes() -> Tensor:
    """Return the two indexes, ascending, by the sum of ``2 ** index`` of nonzero weights."""
    rows = []
    for code in range(2**GROUP):
        there = [index for index in range(GROUP) if code >> index & 1]
        others = [index for index in range(GROUP) if index not in there]
        rows.append(sorted((there + others)[:2]))
    return torch.tensor(rows)
