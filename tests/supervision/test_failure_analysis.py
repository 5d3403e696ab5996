"""Failure analysis of several hosts, through the session's dispatch; every time is given, so no test waits."""

import io
import itertools
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
from rich.console import Console as RichConsole
from rich.progress import Progress, TimeRemainingColumn

from launcher.protocol.messages import (
    AgentExited,
    CommandExited,
    LauncherStarted,
    RankExited,
    RankHeartbeat,
    RankRaised,
    RankStack,
)
from launcher.protocol.outcome import RunOutcome
from launcher.protocol.plan import Host
from launcher.protocol.rundir import RunDir
from launcher.supervision import agent_group, failure_analysis, rank_monitor
from launcher.supervision.console import Console, TerminalConsole
from launcher.supervision.finalize import finalize_run
from launcher.supervision.session import Session
from launcher.utils.files import read_json


class Events:
    """A session without agents: messages in, failures out."""

    def __init__(self, plan):
        session = Session(plan, console=Console(io.StringIO()), signals=[], job={})
        self.analysis, self.tracker, self.send = session._analysis, session._tracker, session.dispatch
        self.session = session

    def find_stall(self, now):
        return self.tracker.find_stall(now=now, timeout_s=60.0)


@pytest.fixture
def events(plan_of, tmp_path):
    """Two hosts with two ranks each."""
    hosts = [
        Host(name=name, slots=2, cores=2, memory_bytes=2**34, address=f"10.0.0.{i}") for i, name in enumerate("ab")
    ]
    return Events(replace(plan_of(hosts=hosts), run_dir=str(tmp_path)))


def ended(rank, *, code=None, signal=None, time=0.0, by_launcher=False):
    return RankExited(rank=rank, time=time, code=code, signal=signal, tail="", by_launcher=by_launcher)


def heartbeat(rank, step, *, phase="forward", age_s=0.0):
    return RankHeartbeat(rank=rank, phase=phase, step=step, age_s=age_s)


def test_the_earliest_cause_over_all_hosts(events):
    events.send("b", ended(3, code=7, time=5.0), now=0.0)
    events.send("a", ended(0, code=4, time=4.9), now=0.1)
    assert events.analysis.cause(now=0.2, all_over=False) is None
    found = events.analysis.complete(events.analysis.cause(now=0.5, all_over=False))
    assert (found.rank, found.host, found.exit_code) == (0, "a", 4)
    assert [(victim.rank, victim.host) for victim in found.victims] == [(3, "b")]


def test_a_rank_killed_by_its_launcher_precedes_consequences_and_other_signalled_ranks(events):
    error = "RuntimeError: Connection reset by peer"
    events.send("b", RankRaised(rank=3, time=1.0, code=1, error=error, traceback=""), now=0.0)
    events.send("a", ended(1, signal=15, time=1.5, by_launcher=True), now=0.0)
    events.send("a", ended(0, signal=15, time=2.0), now=0.1)
    assert events.analysis.cause(now=0.5, all_over=False).rank == 0


def test_the_first_cause_is_decided_once(events, tmp_path):
    session, long_ago = events.session, time.monotonic() - 60
    events.send("a", RankRaised(rank=1, time=1.0, code=4, error="ValueError: x", traceback=""), now=long_ago)
    session._decide()
    failure, limit = session._failure, session._give_up_at
    assert (failure.rank, failure.exit_code) == (1, 4)
    events.send("b", RankRaised(rank=2, time=0.5, code=5, error="ValueError: y", traceback=""), now=long_ago)
    session._decide()
    assert session._failure is failure
    assert session._give_up_at == limit, "an agent that does not end its ranks would be waited for without end"
    assert RunDir(tmp_path).timeline.read_text().count("the cause") == 1


def test_a_cancelled_run_has_no_cause(events):
    session = events.session
    session._signals.append(signal.SIGTERM)
    session._decide()
    events.send("a", ended(1, signal=15, time=1.0), now=time.monotonic() - 60)
    session._decide()
    assert (session._cancelled_by, session._failure) == (signal.SIGTERM, None)


def test_lost_host(events, tmp_path):
    gone = AgentExited(code=None, signal=9)
    events.analysis.agent_lost("b", agent_group.agent_exited_failure("b", gone, log=tmp_path, tail=""), now=0.0)
    found = events.analysis.cause(now=0.5, all_over=False)
    assert (found.rank, found.host, found.exit_code) == (None, "b", 137)
    assert found.reason == "the host agent on b was ended by signal 9 (SIGKILL)"


def test_unexpected_exit_of_an_agent_is_a_failure(events, tmp_path):
    gone = AgentExited(code=0, signal=None)
    events.analysis.agent_lost("b", agent_group.agent_exited_failure("b", gone, log=tmp_path, tail=""), now=0.0)
    assert events.analysis.cause(now=0.5, all_over=False).exit_code == 1


def test_lost_connection_is_described_by_the_last_line_of_its_log(tmp_path):
    said = "debug\nclient_loop: send disconnect: Broken pipe\n"
    found = agent_group.connection_lost_failure("b", program="ssh", code=255, log=tmp_path, tail=said)
    assert found.reason == (
        "the connection to b was lost: ssh ended with exit code 255, "
        "last line: client_loop: send disconnect: Broken pipe"
    )


def test_failure_of_torchrun_is_a_consequence_of_its_rank(events):
    events.send("a", CommandExited(name="torchrun", role="launcher", time=1.0, code=1, signal=None, tail=""), now=0.0)
    events.send("a", ended(1, code=7, time=1.1), now=0.0)
    assert events.analysis.cause(now=0.5, all_over=False).rank == 1


def test_exception_of_a_rank_is_its_reason_however_it_exits(events):
    events.send("a", RankRaised(rank=1, time=1.0, code=2, error="ConfigError: x", traceback="lines"), now=0.0)
    events.send("a", ended(1, signal=15, time=2.0, by_launcher=True), now=0.1)
    found = events.analysis.complete(events.analysis.cause(now=0.5, all_over=False))
    assert (found.exit_code, found.signal, found.traceback) == (2, None, "lines")


def test_host_whose_ranks_never_started_is_the_straggler(events):
    events.send("a", LauncherStarted(), now=0.0)
    events.send("b", LauncherStarted(), now=0.0)
    for rank in (0, 1):
        events.send("a", heartbeat(rank, 1), now=59.0)
    assert events.find_stall(now=60.0) is None
    found = events.analysis.stall_failure(events.find_stall(now=61.0))
    assert (found.rank, found.host) == (2, "b")
    assert [(place.rank, place.phase) for place in found.ranks][2:] == [(2, "not started"), (3, "not started")]


def test_age_of_a_heartbeat_counts(events):
    events.send("a", heartbeat(0, 5, age_s=3.0), now=10.0)
    events.send("b", heartbeat(2, 5, age_s=1.0), now=9.0)
    assert events.analysis.stall_failure(events.find_stall(now=100.0)).rank == 0


def test_exited_rank_does_not_stall(events):
    events.send("a", ended(0, code=0), now=0.0)
    events.send("a", heartbeat(0, 5), now=0.0)
    assert events.find_stall(now=1e6) is None


def shown(rank, *frames, is_stopped=False):
    lines = "".join(f'  File "{file}", line {line} in {function}\n' for file, line, function in frames)
    text = f"Current thread 0x00007f01 (most recent call first):\n{lines}" if frames else ""
    return RankStack(rank=rank, text=text, is_stopped=is_stopped)


SUM = (("/v/site-packages/torch/distributed/distributed_c10d.py", 9, "all_reduce"), ("/me/train.py", 88, "step"))


class TestStacks:
    def test_complete_once_the_living_ranks_have_answered(self, events):
        events.send("a", LauncherStarted(), now=0.0)
        assert not events.tracker.lacks_stacks  # no rank has started
        for rank in (0, 1):
            events.send("a", heartbeat(rank, 1), now=0.0)
        events.send("a", shown(0), now=0.0)
        assert events.tracker.lacks_stacks
        events.send("a", ended(1, code=3), now=0.0)
        assert not events.tracker.lacks_stacks

    def test_a_rank_that_left_early_is_named_when_all_others_wait(self, events):
        for rank in range(4):
            events.send("ab"[rank // 2], heartbeat(rank, 5), now=0.0)
        events.send("b", ended(2, code=0), now=1.0)
        for rank in (0, 1, 3):
            events.send("a", shown(rank, *SUM), now=61.0)
        found = events.analysis.complete(events.analysis.stall_failure(events.find_stall(now=61.0)))
        assert (found.rank, found.host, found.exit_code) == (2, "b", 124)
        assert found.reason == (
            "rank 2 on b left early, at step 5 of 300, with exit code 0; "
            "ranks 0, 1, 3 wait in all_reduce (train.py:88 in step)"
        )
        assert [(place.rank, place.phase) for place in found.ranks][2] == (2, "ended")

    def test_a_rank_that_took_all_its_steps_did_not_leave_early(self, events):
        for rank in range(4):
            events.send("a", heartbeat(rank, 300), now=0.0)
        events.send("b", ended(2, code=0), now=1.0)
        events.send("a", RankRaised(rank=0, time=2.0, code=1, error="Connection closed by peer", traceback=""), now=1.0)
        assert events.analysis.cause(now=9.0, all_over=False).rank == 0

    def test_rank_outside_of_a_collective_is_the_straggler_though_another_left_early(self, events):
        for rank in range(4):
            events.send("a", heartbeat(rank, 5), now=float(rank))
        events.send("b", ended(2, code=0), now=3.0)
        for rank in (0, 1):
            events.send("a", shown(rank, *SUM), now=70.0)
        events.send("a", shown(3, SUM[1]), now=70.0)
        assert events.analysis.stall_failure(events.find_stall(now=70.0)).rank == 3

    def test_positions_of_the_others_when_one_died_without_an_exception(self, events):
        for rank in range(2):
            events.send("a", heartbeat(rank, 5), now=0.0)
        events.send("a", shown(0, *SUM), now=2.0)
        events.send("a", ended(1, signal=9), now=2.0)
        cause = events.analysis.cause(now=3.0, all_over=False)
        assert events.analysis.is_unexplained(cause)
        (place,) = events.analysis.complete(cause).ranks
        assert (place.rank, place.collective, place.where, place.silent_s) == (
            0,
            "all_reduce",
            "train.py:88 in step",
            2,
        )

    def test_position_of_a_survivor_is_that_of_its_exception(self, events):
        events.send("a", heartbeat(0, 5), now=0.0)
        said = '  File "/me/train.py", line 88, in step\n'
        events.send(
            "a", RankRaised(rank=0, time=1.5, code=1, error="Connection closed by peer", traceback=said), now=2.0
        )
        events.send("a", shown(0), now=2.1)  # it was exiting
        events.send("a", ended(1, signal=9, time=1.0), now=2.0)
        (place,) = events.analysis.complete(events.analysis.cause(now=3.0, all_over=False)).ranks
        assert place.where == "train.py:88 in step"

    def test_exception_needs_no_positions(self, events):
        events.send("a", RankRaised(rank=1, time=1.0, code=1, error="ValueError: x", traceback="lines"), now=0.0)
        cause = events.analysis.cause(now=0.5, all_over=False)
        assert not events.analysis.is_unexplained(cause)
        assert events.analysis.complete(cause).ranks == ()


def test_rank_that_never_reports_its_exit(events):
    for rank in (0, 1, 3):
        events.send("a", ended(rank, code=0), now=0.0)
    assert events.analysis.cause(now=9.0, all_over=True) is None
    assert events.analysis.missing_rank_failure().rank == 2
    events.send("b", ended(2, code=0), now=0.0)
    assert events.analysis.missing_rank_failure() is None


def test_signalled_torchrun_is_inferred_from_the_signals_of_its_ranks(events):
    events.send("a", ended(1, signal=2, time=1.0, by_launcher=True), now=0.0)
    events.send("a", ended(0, signal=2, time=1.1, by_launcher=True), now=0.1)
    assert events.analysis.cause(now=1.0, all_over=False) is None
    found = events.analysis.complete(events.analysis.cause(now=20.0, all_over=False))
    assert (found.host, found.rank, found.exit_code) == ("a", None, 130)
    assert found.reason == "torchrun on a was ended by signal 2 (SIGINT)"
    assert [victim.rank for victim in found.victims] == [0, 1]


def test_signalled_torchrun_is_the_cause_though_ranks_elsewhere_failed_first(events):
    error = "RuntimeError: Connection reset by peer"
    events.send("a", RankRaised(rank=0, time=1.0, code=1, error=error, traceback=""), now=0.0)
    events.send("a", ended(1, signal=15, time=1.2, by_launcher=True), now=0.1)
    events.send("b", ended(2, signal=15, time=1.3, by_launcher=True), now=0.2)
    assert events.analysis.cause(now=1.0, all_over=False) is None
    found = events.analysis.cause(now=9.0, all_over=False)
    assert (found.host, found.rank, found.reason) == ("b", None, "torchrun on b was ended by signal 15 (SIGTERM)")


def test_ranks_killed_by_a_failed_torchrun_do_not_imply_a_signal(events):
    events.send("a", ended(1, signal=15, time=1.0, by_launcher=True), now=0.0)
    events.send("a", CommandExited(name="torchrun", role="launcher", time=2.0, code=1, signal=None, tail=""), now=0.1)
    assert events.analysis.cause(now=20.0, all_over=False).rank == 1


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("SignalException: Process 7 got signal: 15", 15),
        ("a line\ntorch.x.SignalException: Process 7 got signal: 9\nlast", 9),
        ("SignalException: x got signal: " + "9" * 5000, None),
        ("SignalException: x got signal: 0", None),
        ("SignalException: x got signal: 99", None),
        ("got signal: 15", None),
    ],
)
def test_only_a_signal_that_exists_is_read_from_output(events, output, number):
    assert failure_analysis.signal_in_output(output) == number
    events.send("a", CommandExited(name="n", role="prepare", time=1.0, code=1, signal=None, tail=output), now=0.0)
    assert events.analysis.cause(now=9.0, all_over=False).signal == number


@pytest.mark.parametrize("number", [1e308, -1e308, 2**62])
def test_a_progress_bar_gets_a_number_of_steps_that_it_can_compute_with(plan_of, tmp_path, number):
    shown, clock = io.StringIO(), itertools.count(0.0, 10.0)  # slow steps: the time left is beyond the largest float
    terminal = RichConsole(file=shown, force_terminal=True)
    bar = Progress(TimeRemainingColumn(), console=terminal, auto_refresh=False, get_time=lambda: next(clock))
    plan = replace(plan_of(), run_dir=str(tmp_path))
    session = Session(plan, console=TerminalConsole(shown, bar), signals=[], job={})
    with bar:
        for step in range(1, 4):
            session.dispatch(
                "box", msgspec.structs.replace(heartbeat(0, step), numbers={"steps": number}), now=float(step)
            )
    assert shown.getvalue()


def test_a_job_without_a_last_step_has_no_progress_bar(plan_of, tmp_path):
    shown = io.StringIO()
    bar = Progress(console=RichConsole(file=shown, force_terminal=True), auto_refresh=False)
    plan = replace(plan_of(), run_dir=str(tmp_path))
    session = Session(plan, console=TerminalConsole(shown, bar), signals=[], job={})
    session.dispatch("box", msgspec.structs.replace(heartbeat(0, 0), numbers={"steps": 0}), now=1.0)
    assert not bar.tasks


def test_stacks_with_lone_surrogates_are_written(events, tmp_path):
    (tmp_path / "logs").mkdir()
    events.send("a", LauncherStarted(), now=0.0)
    events.send("a", RankStack(rank=0, text="a\ud800b", is_stopped=False), now=0.1)
    events.send("a", ended(1, code=3), now=0.2)
    failure = events.analysis.complete(events.analysis.cause(now=9.0, all_over=False))
    finalize_run(RunOutcome(status="failed", exit_code=3, failure=failure), RunDir(tmp_path), run_id="r")
    assert "a\\ud800b" in RunDir(tmp_path).stacks.read_text()


def test_what_fails_while_a_rank_closes_after_its_signal_is_no_failure(tmp_path, capsys):
    """Other ranks have ended already, and Gloo says so."""
    env = SimpleNamespace(rank=0, host="a", record=tmp_path / "record.json", run_dir=RunDir(tmp_path))

    def closing(ended):
        def work(env, heartbeat):
            try:
                raise ended
            finally:
                raise RuntimeError("Connection closed by peer")

        return work

    assert rank_monitor._exit_code_of_work(closing(SystemExit(75)), env, None) == 75
    with pytest.raises(KeyboardInterrupt):
        rank_monitor._exit_code_of_work(closing(KeyboardInterrupt()), env, None)
    assert not env.record.exists()
    assert capsys.readouterr().err == "note: closing failed: RuntimeError: Connection closed by peer\n"
    (tmp_path / "logs").mkdir()
    assert rank_monitor._exit_code_of_work(closing(ValueError("the cause")), env, None) == 1
    assert "the cause" in capsys.readouterr().err


@pytest.mark.parametrize(("raised", "code"), [(256, 1), (-1, 255), (512, 1), (3, 3)])
def test_a_rank_that_exits_with_a_failure_never_looks_like_a_success(tmp_path, raised, code):
    env = SimpleNamespace(rank=0, host="a", record=tmp_path / "record.json")

    def work(env, heartbeat):
        raise SystemExit(raised)

    assert rank_monitor._exit_code_of_work(work, env, None) == code
    assert read_json(env.record)["code"] == code
