"""How many zeros a training run keeps; models without any are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import distributed as dist

from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.engines.base import Engine

_LEAST_SHARE = 1e-3
"""Of zeros in a matrix that was pruned: some weights of dense ones are zero by chance."""


def report_kept_zeros(engine: Engine) -> str:
    """Return in words how many zeros a training run keeps.

    All ranks call it together, with the weights loaded.

    Raises:
        ConfigError: the model was not pruned.
    """
    counts = _count_zeros(engine)
    pruned = {name: share for name, (share, _) in counts.items() if share >= _LEAST_SHARE}
    if not pruned:
        share = max((share for share, _ in counts.values()), default=0.0)
        why = f"no linear layer of the model is pruned: at most {share:.2g} of a matrix are zeros"
        raise ConfigError("sparsity.keep", "true", why=why, fix="prune it first (job=sparsify), or leave it out")
    numel = sum(counts[name][1] for name in pruned)
    zeros = sum(pruned[name] * counts[name][1] for name in pruned)
    text = f"sparsity: the zeros of {len(pruned)} matrices are kept, {zeros / numel:.1%} of {numel:,} weights"
    dense = sorted(counts.keys() - pruned.keys())
    return f"{text}; without zeros, and trained as they are: {_some(dense)}" if dense else text


def _count_zeros(engine: Engine) -> dict[str, tuple[float, int]]:
    """Return the share of zeros in each linear layer's matrix, and its size, from all ranks."""
    names = engine.linear_matrices().keys()
    found: dict[str, list[int]] = {}
    for shard in engine.shards():
        if shard.name in names:
            part = shard.read()
            zeros, numel, _ = found.get(shard.name, [0, 0, 0])
            found[shard.name] = [zeros + int((part == 0).sum()), numel + part.numel(), math.prod(shard.shape)]
    everyone: Sequence[Mapping[str, Sequence[int]]] = [found]
    if dist.is_initialized():
        gathered: list[Mapping[str, Sequence[int]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, found)
        everyone = gathered
    totals: dict[str, list[int]] = {}
    for each in everyone:
        for name, (zeros, numel, size) in each.items():
            known = totals.get(name, [0, 0, 0])
            totals[name] = [known[0] + zeros, known[1] + numel, size]
    return {name: (zeros / numel, size) for name, (zeros, numel, size) in totals.items()}


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
