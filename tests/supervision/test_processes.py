"""Finding and ending processes."""

import os
import signal
import subprocess
from dataclasses import replace

import pytest

from launcher.utils.processes import Process, descendants, identify


@pytest.fixture
def child():
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_a_process_is_its_pid_and_its_start(child):
    known = identify(child.pid)
    assert known in descendants(os.getpid())
    assert replace(known, started=known.started + 1).send(signal.SIGKILL) is False
    assert child.poll() is None
    assert known.send(signal.SIGKILL) is True
    assert child.wait() == -signal.SIGKILL
    assert known.send(signal.SIGKILL) is False


def test_unused_pid():
    assert identify(2**22 + 1) is None
    assert Process(2**22 + 1, 0).send(signal.SIGTERM) is False


def test_spared_processes_and_their_descendants_live():
    with subprocess.Popen(["sh", "-c", "sleep 600 & echo; wait"], stdout=subprocess.PIPE) as shell:
        shell.stdout.readline()
        below = descendants(shell.pid)
        assert len(below) == 1
        spared = descendants(os.getpid(), spare=[identify(shell.pid)])
        assert not {shell.pid, below[0].pid} & {process.pid for process in spared}
        for process in [*below, identify(shell.pid)]:
            process.send(signal.SIGKILL)
