"""Any signal to any process of a run: the run ends, no process is left, and the cause is named."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import pytest

from launcher.protocol.plan import Command

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL)
WHO = ("session", "agent", "spawner", "rank")
CELLS = [
    (number, who, kind)
    for number, who, kind in product(SIGNALS, WHO, ("stubborn", "grandchild"))
    if not (kind == "stubborn" and (number, who) == (signal.SIGTERM, "rank"))  # it goes on
]


def name_of(cell):
    number, who, kind = cell
    return f"{number.name}-{who}-{kind}"


@pytest.fixture(scope="module")
def bystander():
    """A process of another program, started in the same way as ranks are."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        assert process.poll() is None
        process.kill()


@pytest.fixture(scope="module")
def cells(supervise, bystander, preloading):
    """Every cell of the matrix, forked: run, exit code, seconds until nothing was left."""
    start = partial(preloading, kind="supervision")

    def run(cell):
        number, who, kind = cell
        started = supervise(f"{kind} work", grace_s=0.5, start=start)
        started.wait_until_up()
        os.kill(started.pid(who), number)
        code = started.end()
        return name_of(cell), (started, code, started.seconds_until_gone(10))

    with ThreadPoolExecutor(6) as threads:
        return dict(threads.map(run, CELLS))


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_the_run_ends_truthfully(cells, cell):
    run, code, _ = cells[name_of(cell)]
    number, who, _ = cell
    if who == "session" and number == signal.SIGKILL:
        assert code == -number
        assert run.result["status"] == "cancelled"  # written by the agent
        assert run.result["exit_code"] == 137
        return
    assert code == 128 + number, run.text
    assert run.result["exit_code"] == code
    if who == "session" or (who == "agent" and number != signal.SIGKILL):
        assert run.result["status"] == "cancelled"
        assert not run.run_dir.failure.exists()
        assert run.stderr.startswith(f"cancelled by {number.name}")
        return
    assert run.result["status"] == "failed"
    named = {"agent": "the host agent on box", "spawner": "spawner.py on box", "rank": "rank 1 on box"}[who]
    assert run.failure["reason"].startswith(named)
    assert run.failure["rank"] == (1 if who == "rank" else None)
    assert number.name in run.failure["reason"]


def test_the_rank_monitor_killed(supervise):
    run = supervise("grandchild work")
    run.wait_until_up()
    os.kill(run.pid("monitor"), signal.SIGKILL)
    assert run.end() == 137
    assert run.failure["rank"] == 1


def test_session_and_agent_killed_at_once(supervise):
    run = supervise({0: "grandchild work", 1: "stubborn grandchild work"})
    run.wait_until_up()
    agent = run.pid("agent")
    os.kill(agent, signal.SIGSTOP)  # so that it has no time to react to the first
    os.kill(run.process.pid, signal.SIGKILL)
    os.kill(agent, signal.SIGKILL)
    run.process.wait()
    run.seconds_until_gone(10)


def test_a_second_interrupt_kills_at_once(supervise):
    run = supervise("ignore_interrupts stubborn work", grace_s=600.0)
    run.wait_until_up()
    os.kill(run.process.pid, signal.SIGINT)
    run.wait_for(lambda: "interrupted" in run.run_dir.log_of("box", 0).read_text())
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end() == 130


def test_ranks_may_save_when_cancelled(supervise):
    run = supervise("save_when_cancelled work")
    run.wait_until_up()
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end() == 75
    assert run.result["status"] == "preempted"
    assert all((run.run_dir.path / f"saved.{rank}").exists() for rank in range(2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_has_nothing_to_save_yet_is_preempted_too(supervise, number):
    """Whether a rank handles the signal already depends on how far it has started."""
    run = supervise("up_without_a_step", handles_preemption=True)
    run.wait_until_up()
    os.kill(run.process.pid, number)
    assert run.end() == 75
    assert run.result["status"] == "preempted"


def test_a_run_that_saved_is_preempted_even_if_its_ranks_are_killed_while_they_exit(supervise):
    run = supervise("save_and_hang_when_cancelled work", grace_s=1.0)
    run.wait_until_up()
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end() == 75
    assert run.result["status"] == "preempted"


def test_an_agent_gives_its_ranks_the_time_of_its_signal(supervise):
    """As when Slurm sends a signal to every step of a job."""
    run = supervise("save_slowly_when_preempted work", grace_s=0.2, preempt_grace_s=60.0)
    run.wait_until_up()
    os.kill(run.pid("agent"), signal.SIGUSR1)
    assert run.end() == 75
    assert all((run.run_dir.path / f"saved.{rank}").exists() for rank in range(2))


def test_what_forks_while_it_is_killed_is_killed_too(supervise):
    run = supervise({0: "work", 1: "fork_without_end work"})
    run.wait_until_up()
    time.sleep(0.2)
    os.kill(run.pid("rank"), signal.SIGKILL)
    assert run.end() == 137


def sleeper(up):
    """Return a command that runs until it is killed, and makes the file ``up`` when it has begun."""
    code = f"import pathlib, signal, time; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(up)!r}).touch()"
    return Command(argv=(sys.executable, "-c", f"{code}; time.sleep(600)"))


@pytest.mark.parametrize(("who", "number"), [("session", signal.SIGTERM), ("agent", signal.SIGKILL)])
def test_a_signal_during_preparation(supervise, tmp_path, who, number):
    run = supervise("work", build_commands=(sleeper(tmp_path / "up"),))
    run.wait_for((tmp_path / "up").exists)
    os.kill(run.pid(who), number)
    assert run.end() == 128 + number
    run.seconds_until_gone(10)


def test_an_interrupt_ends_the_wait_for_a_sidecar(supervise, tmp_path):
    run = supervise("some_steps", sidecars=(sleeper(tmp_path / "up"),))
    run.wait_for(lambda: "waiting for" in run.stdout)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end() == 0
    assert run.result["status"] == "completed"
