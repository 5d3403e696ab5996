"""A sign of life every second, from a thread of its own.

The main thread may wait for a disk, or for a terminal that was stopped with Ctrl-S; that is no reason to count as dead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

PULSE_S = 1.0


class Pulse:
    """Calls ``beat`` every second until it is stopped."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait until no call is under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(PULSE_S):
            self._beat()
