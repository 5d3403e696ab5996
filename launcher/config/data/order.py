"""The order of samples: which sequence of a data set stands at a position of the run.

Every order is a pure function of seed and position, the same on any number of ranks and whatever the batch is.
"""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Protocol

from launcher.config.data.mixture import mixture_pattern

_ROUNDS = 6
_MASK_64 = (1 << 64) - 1
SORTED_ROWS = 2048
"""Positions among which an order by length moves sequences."""
_GROUP = 32
"""Positions in a row that get sequences of about one length."""


def sample_index(seed: int, index: int, num_sequences: int) -> int:
    """Return which of ``num_sequences`` sequences is the ``index``-th of a run.

    Args:
        seed: another seed gives another order.
        index: sequences drawn before the step + position in the global batch, from 0 without end.
        num_sequences: size of the data set; every epoch shows each sequence once, in an order of its own.
    """
    epoch, value = divmod(index, num_sequences)
    half_bits = max(1, ((num_sequences - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    while True:
        value = _permute(value, keys, half_bits)
        if value < num_sequences:
            return value


def _permute(value: int, keys: tuple[int, ...], half_bits: int) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half_bits | right


def _mix(value: int) -> int:
    """Scramble 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK_64
    return value ^ (value >> 31)


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def held_out_numbers(size: int, share: float) -> list[int]:
    """Return which examples of a source of ``size`` are held out, the same in every run.

    A source of two examples or more has at least one of each kind.

    Args:
        size: how many examples the source has.
        share: between 0 and 1.
    """
    count = min(max(1, round(size * share)), size - 1) if size > 1 and share else 0
    return [sample_index(0, number, size) for number in range(count)]


_MULTIPLE = 8
"""Padded lengths are multiples of this, so that kernels see few different ones."""


def padded_length(lengths: Sequence[int]) -> int:
    """Return the length of a micro-batch of rows of these lengths."""
    return -(-max(lengths) // _MULTIPLE) * _MULTIPLE


class SampleOrder(Protocol):
    """An order of the sequences of a data set, without end."""

    def index(self, seed: int, position: int) -> int:
        """Return the number of the sequence at ``position`` of the run, from 0."""


class Shuffled:
    """All sequences once an epoch, in another order each time."""

    def __init__(self, num_sequences: int) -> None:
        self.num_sequences = num_sequences

    def index(self, seed: int, position: int) -> int:
        """Return the number of the sequence at ``position`` of the run, from 0."""
        return sample_index(seed, position, self.num_sequences)


class Mixture:
    """Sources in exact shares: after N positions each has had its share of N, within one.

    Each source goes through its own sequences again and again, in another order each time.

    Args:
        sizes: sequences of each source, whose numbers follow each other.
        weights: of each source; only their ratios matter.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[Fraction]) -> None:
        self._sizes = list(sizes)
        self._starts = [0, *accumulate(sizes)]
        self._pattern = mixture_pattern(weights)
        self._counts = [self._pattern.count(source) for source in range(len(sizes))]
        drawn = [0] * len(sizes)
        self._earlier = []
        for source in self._pattern:
            self._earlier.append(drawn[source])
            drawn[source] += 1

    def index(self, seed: int, position: int) -> int:
        """Return the number of the sequence at ``position`` of the run, from 0."""
        period, at = divmod(position, len(self._pattern))
        source = self._pattern[at]
        drawn = period * self._counts[source] + self._earlier[at]
        return self._starts[source] + sample_index(seed + ((source + 1) << 64), drawn, self._sizes[source])


class ByLength:
    """Another order, whose neighbours are of about one length: batches have little padding.

    Within each window of positions the sequences of one source change places among themselves: what an epoch shows,
    and the shares of a mixture, stay exact.

    Args:
        inner: the order to start from.
        num_tokens: of a sequence, by its number.
        sizes: sequences of each source, whose numbers follow each other.
        epoch: positions after which a new window begins; ``None`` for none.
    """

    def __init__(
        self, inner: SampleOrder, num_tokens: Callable[[int], int], *, sizes: Sequence[int], epoch: int | None
    ) -> None:
        self._inner, self._num_tokens, self._epoch = inner, num_tokens, epoch
        self._starts = list(accumulate(sizes, initial=0))
        self._cached: dict[tuple[int, int], list[int]] = {}

    def index(self, seed: int, position: int) -> int:
        """Return the number of the sequence at ``position`` of the run, from 0."""
        within = position % self._epoch if self._epoch else position
        first = position - within % SORTED_ROWS
        size = SORTED_ROWS if self._epoch is None else min(SORTED_ROWS, self._epoch - (within - within % SORTED_ROWS))
        key = (seed, first)
        if key not in self._cached:
            while len(self._cached) > 1:  # a step may end in the next window, and evaluation reads none
                del self._cached[next(iter(self._cached))]
            self._cached[key] = self._sorted(seed, first, size)
        return self._cached[key][position - first]

    def _sorted(self, seed: int, first: int, size: int) -> list[int]:
        drawn = [self._inner.index(seed, first + at) for at in range(size)]
        groups = size // _GROUP
        ranks = [sample_index(seed, first * groups + group, groups) for group in range(groups)]
        ranks.append(groups)  # what is left over comes last
        places: dict[int, list[int]] = {}
        for at, number in enumerate(drawn):
            places.setdefault(bisect_right(self._starts, number), []).append(at)
        found = [0] * size
        for own in places.values():
            numbers = sorted((drawn[at] for at in own), key=lambda number: (self._num_tokens(number), number))
            for at, number in zip(sorted(own, key=lambda at: (ranks[at // _GROUP], at)), numbers, strict=True):
                found[at] = number
        return found
