"""Rounds of pairs."""

from __future__ import annotations

from itertools import combinations

import pytest

from launcher.doctor.collective import ALL_PAIRS_UP_TO, pair_rounds


@pytest.mark.parametrize("num_hosts", range(1, 40))
def test_no_host_meets_two_others_at_once_and_no_pair_meets_twice(num_hosts: int) -> None:
    plan = pair_rounds(num_hosts)
    for pairs in plan:
        hosts = [host for pair in pairs for host in pair]
        assert len(hosts) == len(set(hosts))
    met = [pair for pairs in plan for pair in pairs]
    assert len(met) == len(set(met))
    assert all(0 <= low < high < num_hosts for low, high in met)


@pytest.mark.parametrize("num_hosts", range(1, ALL_PAIRS_UP_TO + 1))
def test_every_pair_of_few_hosts_meets_in_as_few_rounds_as_can_be(num_hosts: int) -> None:
    plan = pair_rounds(num_hosts)
    assert {pair for pairs in plan for pair in pairs} == set(combinations(range(num_hosts), 2))
    assert len(plan) <= num_hosts


@pytest.mark.parametrize("num_hosts", [ALL_PAIRS_UP_TO + 1, 1000])
def test_many_hosts_meet_their_neighbours(num_hosts: int) -> None:
    plan = pair_rounds(num_hosts)
    assert sum(map(len, plan)) == num_hosts
    assert len(plan) <= 3
