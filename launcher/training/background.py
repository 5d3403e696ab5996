"""Work beside the training steps: a thread of low priority, and the pace at which it writes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from launcher.checkpoint.file_writer import BLOCK_BYTES

_NICENESS = 5
"""Of the thread, so that steps go first on a machine whose cores are all busy."""
_CORE_SHARE = 0.06
"""Of one core, for writing.

A step waits for its slowest core, so steps become longer by as much.
"""
_HOST_BYTES_PER_S = 100e6
"""Written by all ranks of a host.

A disk takes time of the processors that no thread's clock counts: interrupts, and in a virtual machine the host's copy.
At 340 MB/s, steps beside a save took 1.2 times as long on two cores while the thread used 0.04 of one.
"""


class BackgroundCall:
    """A call on a thread of low priority that does not keep the process alive.

    Args:
        call: begins at once.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # of this thread alone, on Linux
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001  (raised again by who waits)
            self._error = error

    @property
    def is_done(self) -> bool:
        """Whether it has returned or failed."""
        return not self._thread.is_alive()

    def wait(self, *, timeout_s: float) -> None:
        """Return when it is done, or after some time."""
        self._thread.join(timeout_s)

    def result(self) -> None:
        """Wait, and raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


class Pace:
    """Spreads a thread's writing over the steps beside it.

    Args:
        num_bytes: to be written.
        num_writers: ranks that write on this host.
        limit_s: the writing takes no longer because of this; 0 for full speed.
    """

    def __init__(self, *, num_bytes: int, num_writers: int = 1, limit_s: float) -> None:
        self._num_blocks, self._limit_s = max(1, num_bytes // BLOCK_BYTES), limit_s
        self._block_s = num_writers * BLOCK_BYTES / _HOST_BYTES_PER_S
        self._written, self._in_a_hurry = 0, threading.Event()
        self._started: tuple[float, float] | None = None

    def keep(self) -> None:
        """Sleep as long as the pace demands; the thread calls it after each block."""
        now_s, cpu_s = time.perf_counter(), time.thread_time()
        if self._started is None:  # the clocks begin after the first block, which counts for nothing
            self._started = now_s, cpu_s
            return
        self._written += 1
        by_cost_s = max((cpu_s - self._started[1]) / _CORE_SHARE, self._written * self._block_s)
        due_s = min(by_cost_s, self._limit_s * min(1.0, self._written / self._num_blocks))
        if (ahead_s := due_s - (now_s - self._started[0])) > 0:
            self._in_a_hurry.wait(ahead_s)

    def hurry(self) -> None:
        """Go on at full speed: the run waits for it."""
        self._in_a_hurry.set()
