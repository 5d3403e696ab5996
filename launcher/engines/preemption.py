"""Being asked to make room: SIGTERM or SIGUSR1 means save and leave, with the exit code that says "resume me".

Not every rank hears of it, or hears of it during the same step. So a rank only notes that it was asked; the engines add
the notes up in the all-reduce that ends every step, and all ranks leave after the same one.
"""

from __future__ import annotations

import signal
from types import FrameType

from launcher.errors import EXIT_PREEMPTED

_ASKING = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """What this rank has been asked, from ``listen`` to the end of the process.

    The handlers stay until then: torchrun signals the ranks that are still about to exit when the first one has.
    """

    def __init__(self) -> None:
        self._requested = False
        self._has_work = False

    def listen(self) -> None:
        """Take the signals; call it in the main thread. Until ``hold`` there is nothing to save: leave at once."""
        for number in (*_ASKING, signal.SIGINT):
            signal.signal(number, self._note)
            signal.siginterrupt(number, False)  # no system call of anybody's library is cut short

    def hold(self) -> None:
        """From now on only note the request: the training loop asks for it."""
        self._has_work = True

    def requested(self) -> bool:
        """Return whether this rank has been asked to leave."""
        return self._requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._requested:  # once is enough: whoever is impatient sends SIGKILL
            return
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self._requested = True
        if not self._has_work:
            raise SystemExit(EXIT_PREEMPTED)
