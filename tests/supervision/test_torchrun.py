"""The real torchrun, and real collectives."""

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.ports import free_port


@pytest.fixture(scope="module")
def ended(supervise, preloading):
    """Runs that end by themselves, side by side."""
    asked = {
        "stalled": ({0: "meet sum_later", 1: "meet hold_up"}, {"stall_timeout_s": 10.0}),
        "failed": ({0: "meet sum_later", 1: "meet exit_3"}, {}),
    }

    def run(name):
        do, settings = asked[name]
        started = supervise(do, torchrun_on=free_port(), start=preloading, **settings)
        return name, (started, started.end(300))

    with ThreadPoolExecutor(2) as threads:
        return dict(threads.map(run, asked))


def test_the_rank_that_misses_a_collective_is_named(ended):
    run, code = ended["stalled"]
    assert code == 124, run.text
    assert run.failure["rank"] == 1
    assert "in stand_still" in run.failure["traceback"]
    assert "in sum_over_ranks" in run.run_dir.log_of("box", 0).read_text()


def test_the_true_exit_code_gets_past_torchrun(ended):
    run, code = ended["failed"]
    assert code == 3, run.text
    assert run.failure["rank"] == 1
    assert [victim["rank"] for victim in run.failure["victims"]] == [0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_torchrun_itself_is_ended(supervise, number):
    run = supervise("grandchild work", torchrun_on=free_port())
    run.wait_until_up()
    os.kill(run.pid("torchrun"), number)
    assert run.end() == 128 + number
    assert f"torchrun on box was ended by signal {number}" in run.failure["reason"]
    run.seconds_until_gone(10)


def test_a_port_that_is_taken(supervise):
    with socket.create_server(("127.0.0.1", 0)) as other:
        run = supervise("work", torchrun_on=other.getsockname()[1])
        assert run.end() == 1
    assert "port taken\n" in run.stdout, run.text
