"""Judging several hosts; every time is given, nothing is waited for."""

from dataclasses import replace

import pytest

from launcher.plan import Host
from launcher.rundir import RunDir
from launcher.supervise.judge import Judge
from launcher.supervise.messages import CommandEnded, RankBeat, RankEnded, RankRaised, Started


@pytest.fixture
def judge(plan_of, tmp_path):
    """Two hosts with two ranks each."""
    hosts = [
        Host(name=name, slots=2, cores=2, memory_bytes=2**34, address=f"10.0.0.{i}") for i, name in enumerate("ab")
    ]
    return Judge(replace(plan_of(hosts=hosts), stall_timeout_s=60.0), RunDir(tmp_path))


def ended(rank, *, code=None, signal=None, time=0.0):
    return RankEnded(rank=rank, time=time, code=code, signal=signal, tail="")


def beat(rank, step, *, phase="forward", age_s=0.0):
    return RankBeat(rank=rank, phase=phase, step=step, age_s=age_s)


def test_the_earliest_cause_over_all_hosts(judge):
    judge.hear("b", ended(3, code=7, time=5.0), now=0.0)
    judge.hear("a", ended(0, code=4, time=4.9), now=0.1)
    assert judge.cause(now=0.2, all_over=False) is None
    found = judge.complete(judge.cause(now=0.5, all_over=False))
    assert (found.rank, found.host, found.exit_code) == (0, "a", 4)
    assert [(victim.rank, victim.host) for victim in found.victims] == [(3, "b")]


def test_a_host_that_is_lost(judge):
    judge.lost_agent("b", code=-9, tail="", now=0.0)
    found = judge.cause(now=0.5, all_over=False)
    assert (found.rank, found.host, found.exit_code) == (None, "b", 137)
    assert found.reason == "the host agent on b was ended by signal 9 (SIGKILL)"


def test_an_agent_that_ends_without_reason_is_a_failure(judge):
    judge.lost_agent("b", code=0, tail="", now=0.0)
    assert judge.cause(now=0.5, all_over=False).exit_code == 1


def test_torchrun_is_not_blamed_for_its_rank(judge):
    judge.hear("a", CommandEnded(name="torchrun", role="launcher", time=1.0, code=1, signal=None, tail=""), now=0.0)
    judge.hear("a", ended(1, code=7, time=1.1), now=0.0)
    assert judge.cause(now=0.5, all_over=False).rank == 1


def test_what_a_rank_raised_is_its_reason_however_it_ended(judge):
    judge.hear("a", RankRaised(rank=1, time=1.0, code=2, error="ConfigError: x", traceback="lines"), now=0.0)
    judge.hear("a", ended(1, signal=15, time=2.0), now=0.1)
    found = judge.complete(judge.cause(now=0.5, all_over=False))
    assert (found.exit_code, found.signal, found.traceback) == (2, None, "lines")


def test_the_host_whose_ranks_never_started_holds_up_the_others(judge):
    judge.hear("a", Started(), now=0.0)
    judge.hear("b", Started(), now=0.0)
    for rank in (0, 1):
        judge.hear("a", beat(rank, 1), now=59.0)
    assert judge.stalled(now=60.0) is None
    found = judge.stalled(now=61.0)
    assert (found.rank, found.host) == (2, "b")
    assert [(place.rank, place.phase) for place in found.ranks][2:] == [(2, "not started"), (3, "not started")]


def test_age_counts(judge):
    judge.hear("a", beat(0, 5, age_s=3.0), now=10.0)
    judge.hear("b", beat(2, 5, age_s=1.0), now=9.0)
    assert judge.stalled(now=100.0).rank == 0


def test_a_rank_that_has_ended_is_not_waited_for(judge):
    judge.hear("a", ended(0, code=0), now=0.0)
    judge.hear("a", beat(0, 5), now=0.0)
    assert judge.stalled(now=1e6) is None


def test_a_rank_that_never_reports(judge):
    for rank in (0, 1, 3):
        judge.hear("a", ended(rank, code=0), now=0.0)
    assert judge.cause(now=9.0, all_over=True) is None
    assert judge.missing().rank == 2
    judge.hear("b", ended(2, code=0), now=0.0)
    assert judge.missing() is None
