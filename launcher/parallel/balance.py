"""Which blocks make a stretch: contiguous ones, so that the slowest stretch is as fast as can be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def stretches(costs: Sequence[float], num_stretches: int, *, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Cut blocks into stretches of at least one block whose largest cost is the smallest possible.

    Exact, by dynamic programming over (blocks, stretches). Of equal cuts an even one is taken: small sums of squares.

    Args:
        costs: of each block, in order.
        num_stretches: at most as many as there are blocks.
        first: cost of what the first stretch has besides, the embeddings.
        last: cost of what the last stretch has besides, the output head.
    """
    assert 1 <= num_stretches <= len(costs), "every stretch has a block"
    sums = [0.0, *itertools.accumulate(costs)]

    def cost(begin: int, end: int, number: int) -> float:
        extra = first * (number == 0) + last * (number == num_stretches - 1)
        return sums[end] - sums[begin] + extra

    # best[end]: the largest cost, the sum of squares and the cuts of the blocks before ``end``
    best: dict[int, tuple[float, float, tuple[int, ...]]]
    best = {end: (cost(0, end, 0), cost(0, end, 0) ** 2, (0, end)) for end in range(1, len(costs) + 1)}
    for number in range(1, num_stretches):
        best = {
            end: min(
                (max(best[begin][0], here), best[begin][1] + here**2, (*best[begin][2], end))
                for begin in range(number, end)
                for here in [cost(begin, end, number)]
            )
            for end in range(number + 1, len(costs) + 1)
        }
    return [range(begin, end) for begin, end in itertools.pairwise(best[len(costs)][2])]
