"""What a person at a terminal sees, and what happens when the terminal goes."""

import os
import pty

import pytest


@pytest.fixture
def terminal():
    master, slave = pty.openpty()
    yield master, slave
    for descriptor in (master, slave):
        try:
            os.close(descriptor)
        except OSError:  # closed by the test
            continue


def shown(master) -> str:
    """Return everything written to the terminal until its last writer is gone."""
    data = b""
    while True:
        try:
            data += os.read(master, 65536)
        except OSError:
            return data.decode()


def test_lines_above_a_progress_bar(supervise, terminal):
    master, slave = terminal
    run = supervise({0: "some_steps wait_a_moment", 1: "some_steps wait_a_moment"}, terminal=slave)
    os.close(slave)
    text = shown(master)
    assert run.end() == 0, text
    assert "box:1 | step 3" in text
    assert "3/3" in text
    assert "loss 0.3333" in text


def test_a_terminal_that_is_closed(supervise, terminal):
    master, slave = terminal
    run = supervise("work", terminal=slave)
    os.close(slave)
    run.wait_until_up()
    os.close(master)
    assert run.end() == 129
    assert run.result["status"] == "cancelled"
    run.seconds_until_gone(10)
