"""Judging several hosts; every time is given, nothing is waited for."""

from dataclasses import replace

import pytest

from launcher.protocol.messages import (
    AgentExited,
    CommandExited,
    LauncherStarted,
    RankExited,
    RankHeartbeat,
    RankRaised,
    RankStack,
)
from launcher.protocol.plan import Host
from launcher.protocol.rundir import RunDir
from launcher.supervision import agent_group
from launcher.supervision.failure_analysis import FailureAnalysis


@pytest.fixture
def judge(plan_of, tmp_path):
    """Two hosts with two ranks each."""
    hosts = [
        Host(name=name, slots=2, cores=2, memory_bytes=2**34, address=f"10.0.0.{i}") for i, name in enumerate("ab")
    ]
    return FailureAnalysis(replace(plan_of(hosts=hosts), stall_timeout_s=60.0), RunDir(tmp_path))


def ended(rank, *, code=None, signal=None, time=0.0, by_launcher=False):
    return RankExited(rank=rank, time=time, code=code, signal=signal, tail="", by_launcher=by_launcher)


def heartbeat(rank, step, *, phase="forward", age_s=0.0):
    return RankHeartbeat(rank=rank, phase=phase, step=step, age_s=age_s)


def test_the_earliest_cause_over_all_hosts(judge):
    judge.hear("b", ended(3, code=7, time=5.0), now=0.0)
    judge.hear("a", ended(0, code=4, time=4.9), now=0.1)
    assert judge.cause(now=0.2, all_over=False) is None
    found = judge.complete(judge.cause(now=0.5, all_over=False))
    assert (found.rank, found.host, found.exit_code) == (0, "a", 4)
    assert [(victim.rank, victim.host) for victim in found.victims] == [(3, "b")]


def test_who_was_told_to_end_comes_before_those_who_noticed_or_were_ended_with_it(judge):
    error = "RuntimeError: Connection reset by peer"
    judge.hear("b", RankRaised(rank=3, time=1.0, code=1, error=error, traceback=""), now=0.0)
    judge.hear("a", ended(1, signal=15, time=1.5, by_launcher=True), now=0.0)
    judge.hear("a", ended(0, signal=15, time=2.0), now=0.1)
    assert judge.cause(now=0.5, all_over=False).rank == 0


def test_a_host_that_is_lost(judge, tmp_path):
    gone = AgentExited(code=None, signal=9)
    judge.lost_agent("b", agent_group.agent_exited_failure("b", gone, log=tmp_path, tail=""), now=0.0)
    found = judge.cause(now=0.5, all_over=False)
    assert (found.rank, found.host, found.exit_code) == (None, "b", 137)
    assert found.reason == "the host agent on b was ended by signal 9 (SIGKILL)"


def test_an_agent_that_ends_without_reason_is_a_failure(judge, tmp_path):
    gone = AgentExited(code=0, signal=None)
    judge.lost_agent("b", agent_group.agent_exited_failure("b", gone, log=tmp_path, tail=""), now=0.0)
    assert judge.cause(now=0.5, all_over=False).exit_code == 1


def test_a_connection_that_breaks_off_is_told_in_its_own_words(tmp_path):
    said = "debug\nclient_loop: send disconnect: Broken pipe\n"
    found = agent_group.connection_lost_failure("b", program="ssh", code=255, log=tmp_path, tail=said)
    assert found.reason == (
        "the connection to b was lost: ssh ended with exit code 255, saying: client_loop: send disconnect: Broken pipe"
    )


def test_torchrun_is_not_blamed_for_its_rank(judge):
    judge.hear("a", CommandExited(name="torchrun", role="launcher", time=1.0, code=1, signal=None, tail=""), now=0.0)
    judge.hear("a", ended(1, code=7, time=1.1), now=0.0)
    assert judge.cause(now=0.5, all_over=False).rank == 1


def test_what_a_rank_raised_is_its_reason_however_it_ended(judge):
    judge.hear("a", RankRaised(rank=1, time=1.0, code=2, error="ConfigError: x", traceback="lines"), now=0.0)
    judge.hear("a", ended(1, signal=15, time=2.0, by_launcher=True), now=0.1)
    found = judge.complete(judge.cause(now=0.5, all_over=False))
    assert (found.exit_code, found.signal, found.traceback) == (2, None, "lines")


def test_the_host_whose_ranks_never_started_holds_up_the_others(judge):
    judge.hear("a", LauncherStarted(), now=0.0)
    judge.hear("b", LauncherStarted(), now=0.0)
    for rank in (0, 1):
        judge.hear("a", heartbeat(rank, 1), now=59.0)
    assert judge.standstill(now=60.0) is None
    found = judge.blame(judge.standstill(now=61.0))
    assert (found.rank, found.host) == (2, "b")
    assert [(place.rank, place.phase) for place in found.ranks][2:] == [(2, "not started"), (3, "not started")]


def test_age_counts(judge):
    judge.hear("a", heartbeat(0, 5, age_s=3.0), now=10.0)
    judge.hear("b", heartbeat(2, 5, age_s=1.0), now=9.0)
    assert judge.blame(judge.standstill(now=100.0)).rank == 0


def test_a_rank_that_has_ended_is_not_waited_for(judge):
    judge.hear("a", ended(0, code=0), now=0.0)
    judge.hear("a", heartbeat(0, 5), now=0.0)
    assert judge.standstill(now=1e6) is None


def shown(rank, *frames, is_stopped=False):
    lines = "".join(f'  File "{file}", line {line} in {function}\n' for file, line, function in frames)
    text = f"Current thread 0x00007f01 (most recent call first):\n{lines}" if frames else ""
    return RankStack(rank=rank, text=text, is_stopped=is_stopped)


SUM = (("/v/site-packages/torch/distributed/distributed_c10d.py", 9, "all_reduce"), ("/me/train.py", 88, "step"))


class TestStacks:
    def test_all_are_there_once_the_living_have_answered(self, judge):
        judge.hear("a", LauncherStarted(), now=0.0)
        assert not judge.lacks_stacks  # nobody has begun
        for rank in (0, 1):
            judge.hear("a", heartbeat(rank, 1), now=0.0)
        judge.hear("a", shown(0), now=0.0)
        assert judge.lacks_stacks
        judge.hear("a", ended(1, code=3), now=0.0)
        assert not judge.lacks_stacks

    def test_a_rank_that_left_early_is_named_when_all_others_wait(self, judge):
        for rank in range(4):
            judge.hear("ab"[rank // 2], heartbeat(rank, 5), now=0.0)
        judge.hear("b", ended(2, code=0), now=1.0)
        for rank in (0, 1, 3):
            judge.hear("a", shown(rank, *SUM), now=61.0)
        found = judge.complete(judge.blame(judge.standstill(now=61.0)))
        assert (found.rank, found.host, found.exit_code) == (2, "b", 124)
        assert found.reason == (
            "rank 2 on b left early, at step 5 of 300, with exit code 0; "
            "ranks 0, 1, 3 wait in all_reduce (train.py:88 in step)"
        )
        assert [(place.rank, place.phase) for place in found.ranks][2] == (2, "ended")

    def test_a_rank_that_took_all_its_steps_did_not_leave_early(self, judge):
        for rank in range(4):
            judge.hear("a", heartbeat(rank, 300), now=0.0)
        judge.hear("b", ended(2, code=0), now=1.0)
        judge.hear("a", RankRaised(rank=0, time=2.0, code=1, error="Connection closed by peer", traceback=""), now=1.0)
        assert judge.cause(now=9.0, all_over=False).rank == 0

    def test_one_who_is_not_waiting_is_to_blame_though_another_has_left(self, judge):
        for rank in range(4):
            judge.hear("a", heartbeat(rank, 5), now=float(rank))
        judge.hear("b", ended(2, code=0), now=3.0)
        for rank in (0, 1):
            judge.hear("a", shown(rank, *SUM), now=70.0)
        judge.hear("a", shown(3, SUM[1]), now=70.0)
        assert judge.blame(judge.standstill(now=70.0)).rank == 3

    def test_where_the_others_were_when_one_died_without_a_word(self, judge):
        for rank in range(2):
            judge.hear("a", heartbeat(rank, 5), now=0.0)
        judge.hear("a", shown(0, *SUM), now=2.0)
        judge.hear("a", ended(1, signal=9), now=2.0)
        cause = judge.cause(now=3.0, all_over=False)
        assert judge.is_unexplained(cause)
        (place,) = judge.complete(cause).ranks
        assert (place.rank, place.collective, place.where, place.silent_s) == (
            0,
            "all_reduce",
            "train.py:88 in step",
            2,
        )

    def test_a_survivor_that_noticed_is_where_its_exception_was(self, judge):
        judge.hear("a", heartbeat(0, 5), now=0.0)
        said = '  File "/me/train.py", line 88, in step\n'
        judge.hear(
            "a", RankRaised(rank=0, time=1.5, code=1, error="Connection closed by peer", traceback=said), now=2.0
        )
        judge.hear("a", shown(0), now=2.1)  # it was past answering
        judge.hear("a", ended(1, signal=9, time=1.0), now=2.0)
        (place,) = judge.complete(judge.cause(now=3.0, all_over=False)).ranks
        assert place.where == "train.py:88 in step"

    def test_an_exception_explains_itself(self, judge):
        judge.hear("a", RankRaised(rank=1, time=1.0, code=1, error="ValueError: x", traceback="lines"), now=0.0)
        cause = judge.cause(now=0.5, all_over=False)
        assert not judge.is_unexplained(cause)
        assert judge.complete(cause).ranks == ()


def test_a_rank_that_never_reports(judge):
    for rank in (0, 1, 3):
        judge.hear("a", ended(rank, code=0), now=0.0)
    assert judge.cause(now=9.0, all_over=True) is None
    assert judge.missing().rank == 2
    judge.hear("b", ended(2, code=0), now=0.0)
    assert judge.missing() is None


def test_a_signalled_torchrun_that_takes_its_time_is_named_by_what_it_passed_on(judge):
    judge.hear("a", ended(1, signal=2, time=1.0, by_launcher=True), now=0.0)
    judge.hear("a", ended(0, signal=2, time=1.1, by_launcher=True), now=0.1)
    assert judge.cause(now=1.0, all_over=False) is None
    found = judge.complete(judge.cause(now=20.0, all_over=False))
    assert (found.host, found.rank, found.exit_code) == ("a", None, 130)
    assert found.reason == "torchrun on a was ended by signal 2 (SIGINT)"
    assert [victim.rank for victim in found.victims] == [0, 1]


def test_a_signalled_torchrun_is_named_though_ranks_elsewhere_complained_first(judge):
    error = "RuntimeError: Connection reset by peer"
    judge.hear("a", RankRaised(rank=0, time=1.0, code=1, error=error, traceback=""), now=0.0)
    judge.hear("a", ended(1, signal=15, time=1.2, by_launcher=True), now=0.1)
    judge.hear("b", ended(2, signal=15, time=1.3, by_launcher=True), now=0.2)
    assert judge.cause(now=1.0, all_over=False) is None
    found = judge.cause(now=9.0, all_over=False)
    assert (found.host, found.rank, found.reason) == ("b", None, "torchrun on b was ended by signal 15 (SIGTERM)")


def test_ranks_that_torchrun_ended_in_its_own_failure_say_nothing_of_a_signal(judge):
    judge.hear("a", ended(1, signal=15, time=1.0, by_launcher=True), now=0.0)
    judge.hear("a", CommandExited(name="torchrun", role="launcher", time=2.0, code=1, signal=None, tail=""), now=0.1)
    assert judge.cause(now=20.0, all_over=False).rank == 1
