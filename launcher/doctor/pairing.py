"""Who measures with whom, and when: rounds of pairs that share no host, so that a round runs at once."""

from __future__ import annotations

ALL_PAIRS_UP_TO = 16
"""Hosts among which every pair is measured (15 rounds); of more, each host measures its two neighbours on a ring."""

Round = list[tuple[int, int]]


def rounds(num_hosts: int) -> list[Round]:
    """Return the rounds; hosts are numbers from 0, and the smaller number of a pair comes first."""
    return _every_pair(num_hosts) if num_hosts <= ALL_PAIRS_UP_TO else _ring(num_hosts)


def _every_pair(num_hosts: int) -> list[Round]:
    """The circle method of tournaments: one seat stays, the others move on by one after each round."""
    seats: list[int | None] = [*range(num_hosts)]
    if num_hosts % 2:
        seats.append(None)  # whoever meets it has a rest
    plan = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        met = zip(seats[:half], reversed(seats[half:]), strict=True)
        plan.append([(min(a, b), max(a, b)) for a, b in met if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return plan


def _ring(num_hosts: int) -> list[Round]:
    even = [(host, host + 1) for host in range(0, num_hosts - 1, 2)]
    odd = [(host, host + 1) for host in range(1, num_hosts - 1, 2)]
    closing = (0, num_hosts - 1)
    return [even, [closing, *odd]] if num_hosts % 2 == 0 else [even, odd, [closing]]
