"""timeline.jsonl: what happened when, on which host, as the session heard of it. Grows over restarts."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from launcher.secrecy import hide_secrets
from launcher.supervise.failure import ended_how, name_of_signal
from launcher.supervise.messages import (
    AgentSignalled,
    CommandEnded,
    Idle,
    Message,
    Prepared,
    RankBeat,
    RankEnded,
    RankRaised,
    Ready,
    Started,
)


class Timeline:
    """Appends one line an event: ``{"time": …, "host": …, "what": …}``, with the clock of the session."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._has_stepped = False

    def note(self, host: str, what: str) -> None:
        """Write an event down; a full disk must not end the run."""
        line = json.dumps({"time": round(time.time(), 3), "host": host, "what": hide_secrets(what)}, ensure_ascii=False)
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")

    def hear(self, host: str, message: Message) -> None:
        """Write down what a message tells, where it is a turn of events."""
        what = self._event(message)
        if what:
            self.note(host, what)

    def _event(self, message: Message) -> str:
        match message:
            case Ready(code=code):
                return f"the host agent is up, with the code in {code}"
            case Prepared():
                return "prepared"
            case Started():
                return "the launcher of the ranks runs"
            case RankBeat(step=step) if (step or 0) > 0 and not self._has_stepped:
                self._has_stepped = True
                return "the first step is done"
            case RankRaised(rank=rank, error=error):
                return f"rank {rank} raised {error.partition(chr(10))[0]}"
            case RankEnded(rank=rank, code=code, signal=number):
                return f"rank {rank} {ended_how(code, number)}"
            case CommandEnded(name=name, code=code, signal=number):
                return f"{name} {ended_how(code, number)}"
            case AgentSignalled(signal=number):
                return f"somebody sent the host agent {name_of_signal(number)}"
            case Idle():
                return "nothing of the run is left here"
        return ""
