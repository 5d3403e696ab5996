"""timeline.jsonl: events of a run with time and host, appended over restarts."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from launcher.errors.secrets import hide_secrets
from launcher.protocol.messages import (
    AgentIdle,
    AgentMessage,
    AgentReady,
    AgentSignalled,
    CommandExited,
    HostPrepared,
    LauncherStarted,
    RankExited,
    RankHeartbeat,
    RankRaised,
)
from launcher.utils.processes import describe_exit, signal_name


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

    def hear(self, host: str, message: AgentMessage) -> None:
        """Write down what a message tells, where it is a turn of events."""
        what = self._event(message)
        if what:
            self.note(host, what)

    def _event(self, message: AgentMessage) -> str:
        match message:
            case AgentReady(code=code):
                return f"the host agent is up, with the code in {code}"
            case HostPrepared():
                return "prepared"
            case LauncherStarted():
                return "the launcher of the ranks runs"
            case RankHeartbeat(step=step) if (step or 0) > 0 and not self._has_stepped:
                self._has_stepped = True
                return "the first step is done"
            case RankRaised(rank=rank, error=error):
                return f"rank {rank} raised {error.partition(chr(10))[0]}"
            case RankExited(rank=rank, code=code, signal=number):
                return f"rank {rank} {describe_exit(code, number)}"
            case CommandExited(name=name, code=code, signal=number):
                return f"{name} {describe_exit(code, number)}"
            case AgentSignalled(signal=number):
                return f"somebody sent the host agent {signal_name(number)}"
            case AgentIdle():
                return "nothing of the run is left here"
        return ""
