"""Which sample goes where: pure functions of seed, step and position, the same on any number of ranks.

The samples of an epoch are a permutation of the data set, drawn without a list of it: a Feistel network is a
bijection whatever its round function (Luby and Rackoff, 1988), and walking its cycles until the value is small enough
restricts it to any size (Black and Rogaway, 2002). So a sample costs microseconds and no memory, however much data.
"""

from __future__ import annotations

import functools
import hashlib

from launcher.batch import Batch

_ROUNDS = 6
_MASK_64 = (1 << 64) - 1


def sample_index(seed: int, index: int, num_sequences: int) -> int:
    """Return which of ``num_sequences`` sequences is the ``index``-th of a run.

    Args:
        seed: another seed gives another order.
        index: step x global batch + position in the global batch, from 0 without end.
        num_sequences: size of the data set; every epoch shows each sequence once, in an order of its own.
    """
    epoch, value = divmod(index, num_sequences)
    half_bits = max(1, ((num_sequences - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    while True:
        value = _permute(value, keys, half_bits)
        if value < num_sequences:
            return value


def positions(rank: int, *, batch: Batch) -> list[range]:
    """Return the positions in the global batch that each micro-batch of a data-parallel rank holds.

    Micro-batch m of all ranks together covers the m-th stretch of the global batch, so the samples of a step and
    their order do not depend on how it is divided.
    """
    starts = ((part * batch.data_parallel + rank) * batch.micro for part in range(batch.accumulation))
    return [range(start, start + batch.micro) for start in starts]


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


@functools.lru_cache(maxsize=4)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))
