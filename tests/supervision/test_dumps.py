"""Stack dumps of a process: answers, timeouts, a suspended process, and py-spy."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.supervision.stack_dump import StackDump, read_dump
from launcher.utils.processes import identify
from tests.helpers import wait_for

ANSWERS = "import faulthandler, signal; faulthandler.register(signal.SIGUSR2, file=2)"
IGNORES = "import signal; signal.signal(signal.SIGUSR2, signal.SIG_IGN)"


@pytest.fixture
def started():
    """Processes that are ended after the test."""
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def state_of(started):
    """Return the kernel's letter for what became of the process."""
    return lambda: Path(f"/proc/{started[0].pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def ask(tmp_path, started):
    """Start a process that sleeps, ask it, and return its dump and the stack it shows."""

    def start(setup, *, within_s, stopped=False):
        program, log = tmp_path / "train.py", tmp_path / "log"
        program.write_text(f"{setup}\nimport time\nprint('up', flush=True)\ndef nap():\n    time.sleep(600)\nnap()\n")
        with log.open("w") as output:
            process = subprocess.Popen([sys.executable, program], stdout=output, stderr=output)
        started.append(process)
        wait_for(lambda: "up" in log.read_text())
        time.sleep(0.1)
        if stopped:
            if FREEZES not in setup:
                os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        dump = StackDump(identify(process.pid), log, within_s=within_s)
        wait_for(dump.is_complete)
        return dump, read_dump(dump.take(), is_stopped=dump.is_stopped)

    return start


@pytest.fixture
def py_spy(tmp_path, monkeypatch):
    """Make py-spy a program that does what is given."""

    def put(script):
        folder = tmp_path / "bin"
        folder.mkdir()
        program = folder / "py-spy"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr("launcher.supervision.stack_dump.find_py_spy", lambda: str(program))

    return put


def test_an_answer(ask):
    dump, stack = ask(ANSWERS, within_s=60.0)
    assert stack.where == "train.py:5 in nap"
    assert not dump.is_stopped
    assert "up" not in stack.text  # nothing that was in the log before


def test_a_stopped_process_answers_too_and_is_stopped_again(ask, state_of):
    _, stack = ask(ANSWERS, within_s=60.0, stopped=True)
    assert stack.is_stopped
    assert stack.where == "train.py:5 in nap"
    wait_for(lambda: state_of() == "T")


THREADS = f"""{ANSWERS}
import os, threading
def spin():
    while True: pass
for _ in range(4): threading.Thread(target=spin, daemon=True).start()
"""
FREEZES = "print('up', flush=True)\ndef freeze(): os.kill(os.getpid(), signal.SIGSTOP)\nfreeze()\n"


def test_a_process_with_busy_threads_answers_from_where_it_was_stopped(ask, state_of):
    _, stack = ask(THREADS + FREEZES, within_s=60.0, stopped=True)
    assert stack.where == "train.py:7 in freeze"


def test_no_answer_is_not_waited_for(ask):
    started = time.monotonic()
    dump, stack = ask(IGNORES, within_s=0.3)
    assert dump.is_complete()
    assert stack.where == ""
    assert time.monotonic() - started < 30


def test_a_process_that_is_gone(tmp_path):
    with subprocess.Popen(["true"]) as process:
        gone = identify(process.pid)
    dump = StackDump(gone, tmp_path / "log", within_s=0.0)
    assert dump.is_complete()
    assert dump.take() == ""


def test_py_spy_adds_what_it_sees(ask, py_spy):
    py_spy('echo "__poll (libc.so.6), by $*"')
    _, stack = ask(ANSWERS, within_s=60.0)
    assert stack.where == "train.py:5 in nap"
    assert "py-spy dump --native:\n__poll (libc.so.6), by dump --native --pid " in stack.text
    assert stack.text.startswith(stack.python)
    assert "__poll" not in stack.python


def test_py_spy_that_hangs_is_ended(ask, py_spy):
    py_spy("exec sleep 600")
    _, stack = ask(ANSWERS, within_s=1.0)
    assert stack.where == "train.py:5 in nap"


def test_py_spy_is_not_started_when_there_is_no_time_for_it(ask, py_spy, tmp_path):
    py_spy(f"touch {tmp_path}/called")
    ask(ANSWERS, within_s=0.9)
    assert not (tmp_path / "called").exists()
