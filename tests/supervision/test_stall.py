"""A stalled run: the straggler, the position of every rank, and the end of the run."""

import pytest

from launcher.supervision.stack_dump import StackTrace
from launcher.supervision.stall import (
    RankPosition,
    Stall,
    describe_straggler,
    describe_wait,
    find_straggler,
    format_ranks,
    is_stalled,
)


@pytest.fixture(scope="module")
def stalled(supervise):
    run = supervise({0: "wait_for_others", 1: "hold_up"}, stall_timeout_s=2.0)
    assert run.end() == 124, run.text
    return run


def test_the_straggler_is_named(stalled):
    assert stalled.failure["rank"] == 1
    assert stalled.failure["exit_code"] == stalled.result["exit_code"] == 124
    assert "rank 1 on box has not moved for" in stalled.failure["reason"]
    last = stalled.stderr.splitlines()[-1]
    assert "(last seen in forward of step 2): it is at worker.py:" in last
    assert last.endswith("in stand_still")


def test_the_position_of_every_rank_is_reported(stalled):
    places = [(place["rank"], place["phase"], place["step"]) for place in stalled.failure["ranks"]]
    assert places == [(0, "backward", 2), (1, "forward", 2)]


def test_every_rank_dumps_its_stack_to_its_log(stalled):
    logs = [stalled.run_dir.log_of("box", rank).read_text() for rank in range(2)]
    assert "in wait_in_collective" in logs[0]
    assert "in stand_still" in logs[1]
    assert "in stand_still" in stalled.failure["traceback"]
    assert "in stand_still" in stalled.stderr


def test_a_rank_without_heartbeats_is_named(supervise):
    run = supervise({0: "work", 1: "no_heartbeat"}, stall_timeout_s=2.0)
    assert run.end() == 124
    assert run.failure["rank"] == 1


def test_a_launcher_that_never_starts_its_ranks_is_not_waited_for(supervise):
    from launcher.protocol.plan import Command

    run = supervise("work", agent_command=Command(argv=("sleep", "600")), stall_timeout_s=1.0)
    assert run.end() == 124
    assert "last seen in not started" in run.failure["reason"]


def test_a_rank_that_has_finished_is_not_waited_for(supervise):
    # on a busy machine a start takes seconds
    run = supervise({0: "some_steps", 1: "no_heartbeat"}, stall_timeout_s=6.0)
    assert run.end() == 124
    assert run.failure["rank"] == 1
    assert [(place["rank"], place["phase"], place["step"]) for place in run.failure["ranks"]] == [
        (0, "ended", 3),
        (1, "starting", None),
    ]


def place(step, at):
    return RankPosition(host="box", phase="forward", step=step, at=at)


@pytest.mark.parametrize(
    ("places", "behind"),
    [
        ({0: place(3, 10.0), 1: place(2, 11.0)}, 1),  # a step behind, though it moved last
        ({0: place(2, 10.5), 1: place(2, 10.0)}, 1),  # the same step: who stopped moving first
        ({0: place(1, 5.0), 1: place(None, 9.0)}, 1),  # before its first step
    ],
)
def test_without_stacks_it_is_the_one_furthest_behind(places, behind):
    assert find_straggler(places, {}) == behind


SUM = StackTrace(text="", where="loop.py:88 in train_step", collective="all_reduce")
BARRIER = StackTrace(text="", where="loop.py:99 in save", collective="barrier")
FETCH = StackTrace(text="", where="loop.py:90 in train_step")
READ = StackTrace(text="", where="train.py:41 in read_batch")
STOPPED = StackTrace(text="", where="loop.py:88 in train_step", collective="all_reduce", is_stopped=True)


@pytest.mark.parametrize(
    ("stacks", "odd"),
    [
        ([SUM, SUM, READ, SUM], 2),  # not in the collective
        ([SUM, SUM, READ, READ], 2),  # two of them: the one further behind
        ([SUM, SUM, SUM, BARRIER], 3),  # in another collective
        ([FETCH, FETCH, READ, FETCH], 2),  # no collective is seen, as on GPUs: not where most are
        ([SUM, SUM, SUM, STOPPED], 3),
        ([SUM, SUM, None, SUM], 2),  # one that does not answer
        ([SUM, SUM, BARRIER, BARRIER], 0),  # unknown: the one furthest behind
        ([SUM, SUM, SUM, SUM], 0),
    ],
)
def test_find_straggler(stacks, odd):
    places = {rank: place(5, 10.0 + rank) for rank in range(4)}
    assert find_straggler(places, {rank: stack for rank, stack in enumerate(stacks) if stack}) == odd


def test_the_sentence():
    still = Stall(now=70.0, positions={rank: place(5, 10.0) for rank in range(4)})
    assert describe_straggler(2, still, {0: SUM, 1: SUM, 2: READ, 3: BARRIER}) == (
        "rank 2 on box has not moved for 60 s (last seen in forward of step 5): it is at train.py:41 in read_batch "
        "while ranks 0, 1 wait in all_reduce (loop.py:88 in train_step)"
    )
    assert describe_straggler(2, still, {}) == "rank 2 on box has not moved for 60 s (last seen in forward of step 5)"
    assert describe_wait(still.positions, {3: BARRIER}) == "rank 3 waits in barrier (loop.py:99 in save)"


def test_many_ranks_in_few_words():
    assert format_ranks([3]) == "rank 3"
    assert format_ranks([1, 0]) == "ranks 0, 1"
    assert format_ranks([*range(7), 8, *range(10, 1024)]) == "ranks 0-6, 8, 10-1023"


def test_silence():
    places = {0: place(1, 100.0), 1: place(1, 90.0)}
    assert is_stalled(places, now=101.0, timeout_s=10.5)
    assert not is_stalled(places, now=100.0, timeout_s=10.5)
    assert not is_stalled(places, now=1e9, timeout_s=0)
