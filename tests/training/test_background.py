"""The pace of a thread that writes beside the steps."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from launcher.checkpoint.file_writer import BLOCK_BYTES
from launcher.training import background
from launcher.training.background import Pace


class Clock:
    """Time that passes only where the thread works or sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pace: Pace) -> None:
        self.now_s = self.cpu_s = self.slept_s = 0.0
        clocks = SimpleNamespace(perf_counter=lambda: self.now_s, thread_time=lambda: self.cpu_s)
        monkeypatch.setattr(background, "time", clocks)
        monkeypatch.setattr(pace, "_in_a_hurry", SimpleNamespace(wait=self.sleep))

    def work(self, cpu_s: float, elapsed_s: float) -> None:
        self.cpu_s += cpu_s
        self.now_s += elapsed_s

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self.now_s += seconds


def write(pace: Pace, clock: Clock, blocks: int, *, cpu_s: float, elapsed_s: float) -> None:
    for _ in range(blocks):
        clock.work(cpu_s, elapsed_s)
        pace.keep()


def test_the_thread_takes_a_small_share_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(num_bytes=100 * BLOCK_BYTES, limit_s=1e6)
    clock = Clock(monkeypatch, pace)
    write(pace, clock, 100, cpu_s=0.01, elapsed_s=0.02)
    assert clock.cpu_s / clock.now_s == pytest.approx(0.06, rel=0.02)


@pytest.mark.parametrize("num_writers", [1, 2])
def test_the_ranks_of_a_host_share_the_disk(monkeypatch: pytest.MonkeyPatch, num_writers: int) -> None:
    pace = Pace(num_bytes=100 * BLOCK_BYTES, num_writers=num_writers, limit_s=1e6)
    clock = Clock(monkeypatch, pace)
    write(pace, clock, 100, cpu_s=0.0, elapsed_s=0.002)
    assert 100 * BLOCK_BYTES * num_writers / clock.now_s == pytest.approx(100e6, rel=0.02)


def test_it_is_done_long_before_the_next_save(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(num_bytes=100 * BLOCK_BYTES, limit_s=1.0)
    clock = Clock(monkeypatch, pace)
    write(pace, clock, 100, cpu_s=0.001, elapsed_s=0.002)
    assert clock.now_s == pytest.approx(1.0, rel=0.01)


def test_what_is_slower_than_its_pace_does_not_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(num_bytes=10 * BLOCK_BYTES, limit_s=1.0)
    clock = Clock(monkeypatch, pace)
    write(pace, clock, 10, cpu_s=0.001, elapsed_s=1.0)
    assert clock.slept_s == 0.0


def test_a_hurry_ends_the_sleep() -> None:
    pace = Pace(num_bytes=2 * BLOCK_BYTES, limit_s=1e9)
    pace.keep()
    while time.thread_time() < 1e-3:  # the second block cost something
        pass
    pace._started = (time.perf_counter(), -1e6)  # so that it would sleep for weeks
    sleeping = threading.Thread(target=pace.keep)
    sleeping.start()
    pace.hurry()
    sleeping.join(60)
    assert not sleeping.is_alive()
