"""Which rank runs where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launcher.plan import Host, RankPlace


def first_ranks(hosts: Sequence[Host]) -> list[int]:
    """Return the number of the first rank on each host: ranks are counted host by host."""
    firsts, seen = [], 0
    for host in hosts:
        firsts.append(seen)
        seen += host.slots
    return firsts


def rank_places(hosts: Sequence[Host]) -> Iterator[RankPlace]:
    """Yield where each rank runs, in the order of ranks."""
    for host, first in zip(hosts, first_ranks(hosts), strict=True):
        for local_rank in range(host.slots):
            device = f"cuda:{local_rank}" if host.devices else "cpu" if host.is_known else "?"
            yield RankPlace(rank=first + local_rank, host=host.name, local_rank=local_rank, device=device)
