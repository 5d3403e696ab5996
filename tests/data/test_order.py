"""The order of samples: permutations, the same however a step is divided, and the same in every run."""

from __future__ import annotations

import itertools

import pytest

from launcher.config.data.order import sample_index
from launcher.data.dataloader import batch_positions
from launcher.protocol.plan import Batch


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 4, 5, 7, 16, 17, 100, 833, 1024, 1025])
def test_every_epoch_shows_every_sequence_once(num_sequences: int) -> None:
    for epoch in range(3):
        first = epoch * num_sequences
        shown = [sample_index(7, first + i, num_sequences) for i in range(num_sequences)]
        assert sorted(shown) == list(range(num_sequences))


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [sample_index(seed, epoch * 500 + i, 500) for i in range(500)]

    orders = [order(seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(o) for o in orders}) == 16
    for one in orders:
        assert sum(a == i for i, a in enumerate(one)) < 10, "too close to the order on disk"
        assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(one)) < 15, "neighbours stay together"


def test_every_place_is_equally_likely_for_a_sequence() -> None:
    counts = [0] * 8
    for seed in range(4000):
        counts[sample_index(seed, 3, 8)] += 1
    chi_squared = sum((count - 500) ** 2 / 500 for count in counts)
    assert chi_squared < 24.3  # 0.1 % of fair draws exceed this with 7 degrees of freedom


def test_the_order_never_changes() -> None:
    assert [sample_index(0, i, 1000) for i in range(8)] == [6, 991, 634, 303, 556, 774, 888, 501]
    assert [sample_index(12345, 10**15 + i, 10**12) for i in range(3)] == [727760862015, 788317718881, 795156363554]


SPLITS = [
    Batch(micro_batch=micro, gradient_accumulation_steps=24 // micro // world, data_parallel=world)
    for world in (1, 2, 4)
    for micro in (1, 2, 3, 6)
    if 24 % (micro * world) == 0
]


@pytest.mark.parametrize("batch", SPLITS, ids=str)
def test_a_step_holds_the_same_positions_however_it_is_divided(batch: Batch) -> None:
    shares = [batch_positions(rank, batch=batch) for rank in range(batch.data_parallel)]
    assert all(len(share) == batch.gradient_accumulation_steps for share in shares)
    assert all(len(places) == batch.micro_batch for share in shares for places in share)
    in_order = [at for part in range(batch.gradient_accumulation_steps) for share in shares for at in share[part]]
    assert in_order == list(range(24))
