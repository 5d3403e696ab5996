"""timeline.jsonl: events of a run with time and host, appended over restarts."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from launcher.errors.secrets import hide_secrets
from launcher.protocol.messages import AgentReady, CommandExited, RankExited, RankHeartbeat, RankRaised
from launcher.utils.files import open_append
from launcher.utils.processes import describe_exit, signal_name
from launcher.utils.text import cut_middle

_MAX_CHARS = 4000


class Timeline:
    """Appends ``{"time": …, "host": …, "what": …}`` per event, by the session's clock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._has_stepped = False

    def note(self, host: str, what: str) -> None:
        """Append an event; a full disk must not end the run."""
        what = hide_secrets(cut_middle(what, limit=_MAX_CHARS))
        line = json.dumps({"time": round(time.time(), 3), "host": host, "what": what}, ensure_ascii=False)
        with contextlib.suppress(OSError), open_append(self._path) as file:
            file.write(f"{line}\n".encode(errors="backslashreplace"))

    def agent_ready(self, host: str, message: AgentReady) -> None:
        """Append that the agent of ``host`` runs."""
        self.note(host, f"the host agent is up, with the code in {message.code}")

    def host_prepared(self, host: str) -> None:
        """Append that ``host`` is prepared."""
        self.note(host, "prepared")

    def launcher_started(self, host: str) -> None:
        """Append that the launcher of the ranks runs on ``host``."""
        self.note(host, "the launcher of the ranks runs")

    def rank_heartbeat(self, host: str, message: RankHeartbeat) -> None:
        """Append the first step of the run; other heartbeats are not events."""
        if (message.step or 0) > 0 and not self._has_stepped:
            self._has_stepped = True
            self.note(host, "the first step is done")

    def rank_raised(self, host: str, message: RankRaised) -> None:
        """Append the exception of a rank."""
        self.note(host, f"rank {message.rank} raised {message.error.partition(chr(10))[0]}")

    def rank_exited(self, host: str, message: RankExited) -> None:
        """Append how a rank exited."""
        self.note(host, f"rank {message.rank} {describe_exit(message.code, message.signal)}")

    def command_exited(self, host: str, message: CommandExited) -> None:
        """Append how a preparing command or the launcher exited."""
        self.note(host, f"{message.name} {describe_exit(message.code, message.signal)}")

    def agent_signalled(self, host: str, number: int) -> None:
        """Append that the agent of ``host`` received a signal."""
        self.note(host, f"the host agent received {signal_name(number)}")

    def agent_idle(self, host: str) -> None:
        """Append that every process of the run on ``host`` but the sidecars has exited."""
        self.note(host, "all processes of the run have exited")
