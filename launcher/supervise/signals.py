"""Signals that a user or a scheduler sends to the session, collected instead of obeyed on the spot."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGTSTP)


@contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Yield a list that grows by every signal; what was ignored before (nohup) stays ignored."""
    arrived: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    heard = [number for number in HEARD if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in heard}
    try:
        yield arrived
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
