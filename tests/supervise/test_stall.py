"""A run that stands still: who holds it up, where everybody is, and the end of it."""

import pytest

from launcher.supervise.stall import Position, furthest_behind, silent


@pytest.fixture(scope="module")
def stalled(supervise):
    run = supervise({0: "wait_for_others", 1: "hold_up"}, stall_timeout_s=2.0)
    assert run.end() == 124, run.text
    return run


def test_the_rank_that_holds_up_the_others_is_named(stalled):
    assert stalled.failure["rank"] == 1
    assert stalled.failure["exit_code"] == stalled.result["exit_code"] == 124
    assert "rank 1 on box has not moved for" in stalled.failure["reason"]
    assert "forward of step 2" in stalled.stderr.splitlines()[-1]


def test_where_everybody_was_is_told(stalled):
    places = [(place["rank"], place["phase"], place["step"]) for place in stalled.failure["ranks"]]
    assert places == [(0, "backward", 2), (1, "forward", 2)]


def test_every_rank_dumps_its_stack_to_its_log(stalled):
    logs = [stalled.run_dir.log_of("box", rank).read_text() for rank in range(2)]
    assert "in wait_in_collective" in logs[0]
    assert "in stand_still" in logs[1]
    assert "in stand_still" in stalled.failure["traceback"]
    assert "in stand_still" in stalled.stderr


def test_a_rank_that_never_beats_is_named(supervise):
    run = supervise({0: "work", 1: "never_beat"}, stall_timeout_s=2.0)
    assert run.end() == 124
    assert run.failure["rank"] == 1


def test_a_launcher_that_never_starts_its_ranks_is_not_waited_for(supervise):
    from launcher.plan import Command

    run = supervise("work", start=Command(argv=("sleep", "600")), stall_timeout_s=1.0)
    assert run.end() == 124
    assert "last seen in not started" in run.failure["reason"]


def test_a_rank_that_has_finished_is_not_waited_for(supervise):
    run = supervise({0: "some_steps", 1: "never_beat"}, stall_timeout_s=2.0)
    assert run.end() == 124
    assert run.failure["rank"] == 1
    assert [place["rank"] for place in run.failure["ranks"]] == [1]


def place(step, at):
    return Position(host="box", phase="forward", step=step, at=at)


@pytest.mark.parametrize(
    ("places", "behind"),
    [
        ({0: place(3, 10.0), 1: place(2, 11.0)}, 1),  # a step behind, though it moved last
        ({0: place(2, 10.5), 1: place(2, 10.0)}, 1),  # the same step: who stopped moving first
        ({0: place(1, 5.0), 1: place(None, 9.0)}, 1),  # before its first step
    ],
)
def test_furthest_behind(places, behind):
    assert furthest_behind(places) == behind


def test_silence():
    places = {0: place(1, 100.0), 1: place(1, 90.0)}
    assert silent(places, now=101.0, timeout_s=10.5)
    assert not silent(places, now=100.0, timeout_s=10.5)
    assert not silent(places, now=1e9, timeout_s=0)
