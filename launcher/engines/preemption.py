"""Preemption: on SIGTERM or SIGUSR1, save a checkpoint and exit with the resume code.

Ranks may get the signal during different steps, or not at all. So a rank only records the request; the engines sum the
requests in the all-reduce that ends every step, and all ranks exit after the same one.
"""

from __future__ import annotations

import signal
from types import FrameType

from launcher.errors import EXIT_PREEMPTED

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Whether this rank is preempted; handlers stay from ``install`` to the process's end.

    They stay until then because torchrun signals the ranks that are still about to exit when the first one has.
    """

    def __init__(self) -> None:
        self._requested = False
        self._is_deferred = False

    def install(self) -> None:
        """Install the signal handlers, in the main thread.

        Until ``defer`` is called, the rank exits at once.
        """
        for number in (*_SIGNALS, signal.SIGINT):
            signal.signal(number, self._handle)
            signal.siginterrupt(number, False)  # no system call of a library is interrupted

    def defer(self) -> None:
        """From now on only record the request: the training loop asks for it."""
        self._is_deferred = True

    def requested(self) -> bool:
        """Return whether this rank is to save and exit."""
        return self._requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested:  # the first signal counts
            return
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self._requested = True
        if not self._is_deferred:
            raise SystemExit(EXIT_PREEMPTED)
