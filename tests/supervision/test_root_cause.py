"""Distinguishing the cause from its consequences."""

import signal
from dataclasses import replace

import pytest

from launcher.errors import EXIT_PREEMPTED
from launcher.protocol.outcome import Failure
from launcher.supervision.failure_analysis import (
    COLLECT_FAILURES_S,
    WAIT_FOR_CAUSE_S,
    FailureCandidate,
    is_decided,
    is_port_taken,
    looks_like_consequence,
    root_cause,
    signal_in_output,
)


def failure(rank=0, *, time=0.0, number=None, error="", traceback=""):
    code = 128 + number if number else 1
    return Failure(
        host="box", rank=rank, exit_code=code, signal=number, reason="", error=error, traceback=traceback, time=time
    )


def candidate(found):
    return FailureCandidate(failure=found, is_consequence=looks_like_consequence(found))


@pytest.mark.parametrize(
    ("found", "is_one"),
    [
        (failure(error="torch.distributed.DistBackendError: NCCL error"), True),
        (failure(error="RuntimeError: [pair.cc:547] Connection closed by peer [127.0.0.1]:1"), True),
        (failure(error="RuntimeError: Connection reset by peer"), True),
        (failure(number=signal.SIGTERM), False),
        (failure(number=signal.SIGABRT, traceback="Watchdog caught collective operation timeout"), True),
        (failure(number=signal.SIGABRT, traceback="double free or corruption"), False),
        (failure(number=signal.SIGKILL), False),
        (failure(error="ValueError: x"), False),
        (failure(error="torch.distributed.DistNetworkError: name: EADDRINUSE"), False),
        # what a rank printed before an unrelated death says nothing about it
        (failure(number=signal.SIGSEGV, traceback="Connection reset by peer"), False),
    ],
)
def test_consequences(found, is_one):
    assert looks_like_consequence(found) is is_one


def test_the_cause_comes_before_earlier_consequences():
    broken = candidate(failure(0, time=1.0, error="RuntimeError: Connection closed by peer"))
    cause = candidate(failure(1, time=2.0, error="ValueError: x"))
    late = candidate(failure(2, time=3.0, error="KeyError: y"))
    assert root_cause([broken, late, cause]).rank == 1
    assert root_cause([broken]).rank == 0


def test_waiting():
    cause, broken = candidate(failure(number=9)), candidate(failure(error="RuntimeError: Broken pipe"))
    assert not is_decided([cause], waited_s=COLLECT_FAILURES_S / 2)
    assert is_decided([cause, broken], waited_s=COLLECT_FAILURES_S)
    assert not is_decided([broken], waited_s=COLLECT_FAILURES_S)
    assert is_decided([broken], waited_s=WAIT_FOR_CAUSE_S)


def test_ranks_that_leave_after_saving_get_time_to_leave_together():
    left = candidate(replace(failure(0), exit_code=EXIT_PREEMPTED))
    assert not is_decided([left, left], waited_s=COLLECT_FAILURES_S)
    assert is_decided([left, left], waited_s=WAIT_FOR_CAUSE_S)
    assert is_decided([left, candidate(failure(error="ValueError: x"))], waited_s=COLLECT_FAILURES_S)


def test_port():
    assert is_port_taken(failure(traceback="... name: EADDRINUSE, message: address already in use"))
    assert not is_port_taken(failure(traceback="ValueError"))


def test_what_torchrun_says_of_a_signal():
    said = "torch.distributed.elastic.multiprocessing.api.SignalException: Process 7 got signal: 15"
    assert signal_in_output(said) == 15
    assert signal_in_output("Process 7 ended") is None
