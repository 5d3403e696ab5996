"""How a process beside the ranks learns that the run is over, and how it is kept from outliving it for long."""

from __future__ import annotations

import json
import os
import sys
import threading

_FAILED = 1


class Orders(threading.Thread):
    """Waits on stdin for one line, ``{"exit_code": N}``; its end without one means that the starter is gone.

    Either way this process ends within a time limit from then on, even when its main thread hangs in a library.

    Args:
        finish_s: seconds to finish in after the line.
        orphan_s: seconds to finish in after an end without a line.
    """

    def __init__(self, *, finish_s: float, orphan_s: float) -> None:
        super().__init__(daemon=True, name="orders")
        self._limits = (finish_s, orphan_s)
        self._over = threading.Event()
        self.exit_code = _FAILED
        """Of the run; valid once ``wait`` said that it is over."""

    def run(self) -> None:
        """Read stdin, tell the main thread, and end the process if that takes too long."""
        finish_s, orphan_s = self._limits
        code = _exit_code(sys.stdin.readline())
        self.exit_code = _FAILED if code is None else code
        self._over.set()
        threading.Event().wait(orphan_s if code is None else finish_s)
        print("W&B did not finish in time; metrics.jsonl has everything", flush=True)
        os._exit(_FAILED)

    def wait(self, seconds: float) -> bool:
        """Return whether the run is over, waiting for that at most ``seconds``."""
        return self._over.wait(seconds)


def _exit_code(line: str) -> int | None:
    try:
        return int(json.loads(line)["exit_code"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
