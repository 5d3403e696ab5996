"""Messages between the session and host agents."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from launcher.utils.text import cut_middle

MAX_TEXT_CHARS = 1 << 18
"""Longest text of a message that is shown or searched; logs hold the whole."""


@dataclass(frozen=True, kw_only=True)
class AgentMessage:
    """Base of all messages; each is sent as one line of JSON."""

    kind: ClassVar[str]

    def encode(self) -> bytes:
        """Return the message as a line."""
        return json.dumps({"kind": self.kind, **asdict(self)}).encode() + b"\n"


@dataclass(frozen=True, kw_only=True)
class Assignment(AgentMessage):
    """First message to an agent: the processes to start on its host."""

    kind: ClassVar[str] = "assignment"
    host: dict[str, Any]
    """The ``HostPlan``, as a plain tree."""
    run_dir: str
    run_id: str
    run_hash: str
    """Expected hash of run.yaml on this host."""
    grace_s: float
    """Time between the signal and the kill when the agent ends the ranks by itself."""
    heartbeat_timeout_s: float
    """Seconds of silence after which the session counts as lost; 0 if a pipe shows its end."""
    env: dict[str, str]
    """Variables of the launching environment, secrets too: no file or command line holds them."""
    files: dict[str, str]
    """Text of files that must be in the run directory, by name."""
    session: dict[str, Any]
    """The session's ``ProcessLocation``.
    An agent that finds it in session.json shares the disk."""


@dataclass(frozen=True, kw_only=True)
class StartRanks(AgentMessage):
    """To an agent that is prepared: every host is prepared, so start the ranks."""

    kind: ClassVar[str] = "start_ranks"


@dataclass(frozen=True, kw_only=True)
class Ping(AgentMessage):
    """Keepalive, both ways, every second."""

    kind: ClassVar[str] = "ping"


@dataclass(frozen=True, kw_only=True)
class SessionSuspended(AgentMessage):
    """To an agent: the session will be suspended (Ctrl-Z); no timeout until its next message."""

    kind: ClassVar[str] = "session_suspended"


@dataclass(frozen=True, kw_only=True)
class EndRanks(AgentMessage):
    """To an agent: send a signal to every rank and kill those that still run after ``grace_s``."""

    kind: ClassVar[str] = "end_ranks"
    signal: int
    grace_s: float


@dataclass(frozen=True, kw_only=True)
class DumpStacks(AgentMessage):
    """To an agent: have every rank dump its stacks, and send them. ``EndRanks`` follows."""

    kind: ClassVar[str] = "dump_stacks"
    within_s: float


@dataclass(frozen=True, kw_only=True)
class FinishAgent(AgentMessage):
    """To an idle agent: send the exit code of the run to the sidecars, wait for them, and exit."""

    kind: ClassVar[str] = "finish_agent"
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class AgentReady(AgentMessage):
    """From an agent: it runs and receives messages."""

    kind: ClassVar[str] = "agent_ready"
    scratch: str
    """Its temporary folder, which the session removes if the agent is killed."""
    location: dict[str, Any]
    """The ``ProcessLocation`` of the agent, as a plain tree."""
    code: str
    """Folder of the code to run; a code bundle is unpacked into a folder named by its hash."""


@dataclass(frozen=True, kw_only=True)
class HostPrepared(AgentMessage):
    """From an agent: all commands that prepare the host have succeeded."""

    kind: ClassVar[str] = "host_prepared"


@dataclass(frozen=True, kw_only=True)
class AgentExited(AgentMessage):
    """From an agent supervisor: its agent has exited, and no process of the run is left there."""

    kind: ClassVar[str] = "agent_exited"
    code: int | None
    signal: int | None


@dataclass(frozen=True, kw_only=True)
class LauncherStarted(AgentMessage):
    """From an agent: the launcher of the ranks runs."""

    kind: ClassVar[str] = "launcher_started"
    host: str = ""
    """Host of the ranks, when the agent supervises other hosts than its own."""


@dataclass(frozen=True, kw_only=True)
class OutputLine(AgentMessage):
    """From an agent: a whole line that a process wrote."""

    kind: ClassVar[str] = "output_line"
    source: int | str
    """The rank, or the name of another process (``prepare``)."""
    text: str


@dataclass(frozen=True, kw_only=True)
class FileChunk(AgentMessage):
    """From an agent that shares no disk with the session: bytes of a file in its run directory."""

    kind: ClassVar[str] = "file_chunk"
    path: str
    """Relative to the run directory."""
    offset: int | None
    """Position in the file; ``None`` appends to it."""
    data: str
    """In base64."""
    size: int
    """Size of the whole file in bytes when the chunk was read."""
    grows: bool
    """The file is append-only; any other is replaced once all of it has been received."""


@dataclass(frozen=True, kw_only=True)
class UserNote(AgentMessage):
    """From an agent: a sentence for the user."""

    kind: ClassVar[str] = "user_note"
    text: str


@dataclass(frozen=True, kw_only=True)
class RankHeartbeat(AgentMessage):
    """From an agent: the newest phase and step of a rank."""

    kind: ClassVar[str] = "rank_heartbeat"
    rank: int
    phase: str
    step: int | None
    age_s: float
    """Time since the rank wrote it; clocks of hosts differ."""
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RankRaised(AgentMessage):
    """From an agent: a rank recorded its exception; it has not exited yet."""

    kind: ClassVar[str] = "rank_raised"
    rank: int
    time: float
    code: int
    """Exit code that the rank will return, from 1 to 255."""
    error: str
    """Type and message."""
    traceback: str


@dataclass(frozen=True, kw_only=True)
class RankStack(AgentMessage):
    """From an agent: the stack of a rank, after ``DumpStacks`` or the death of another rank."""

    kind: ClassVar[str] = "rank_stack"
    rank: int
    text: str
    """Stacks of all its threads; empty when it did not answer in time."""
    is_stopped: bool
    """A signal had stopped it."""


@dataclass(frozen=True, kw_only=True)
class RankExited(AgentMessage):
    """From an agent: a rank has exited."""

    kind: ClassVar[str] = "rank_exited"
    rank: int
    time: float
    code: int | None
    """``None`` when a signal ended it."""
    signal: int | None
    tail: str
    """The end of its log, when it failed."""
    by_launcher: bool = False
    """Whether its own launcher (torchrun) sent it that signal, so it is not the cause."""


@dataclass(frozen=True, kw_only=True)
class CommandExited(AgentMessage):
    """From an agent: a preparing command failed, or the launcher of the ranks exited."""

    kind: ClassVar[str] = "command_exited"
    name: str
    role: str
    """``prepare`` or ``launcher``."""
    time: float
    code: int | None
    signal: int | None
    tail: str
    reason: str = ""
    """Reason of the failure, where the exit code alone does not explain it."""


@dataclass(frozen=True, kw_only=True)
class AgentSignalled(AgentMessage):
    """From an agent: it received a signal, so it ends the run."""

    kind: ClassVar[str] = "agent_signalled"
    signal: int


@dataclass(frozen=True, kw_only=True)
class AgentIdle(AgentMessage):
    """From an agent: every process of the run but the sidecars has exited."""

    kind: ClassVar[str] = "agent_idle"


def with_short_texts(message: AgentMessage) -> AgentMessage:
    """Return ``message`` with long texts cut in the middle; files and output stay whole."""
    if isinstance(message, FileChunk | OutputLine):
        return message
    long = {
        name: cut_middle(value, limit=MAX_TEXT_CHARS)
        for name, value in vars(message).items()
        if isinstance(value, str) and len(value) > MAX_TEXT_CHARS
    }
    return replace(message, **long) if long else message


TO_AGENT: frozenset[type[AgentMessage]] = frozenset(
    {Assignment, StartRanks, Ping, SessionSuspended, EndRanks, DumpStacks, FinishAgent}
)
"""Messages from a session."""

FROM_AGENT: frozenset[type[AgentMessage]] = frozenset(
    {
        *(
            Ping,
            AgentReady,
            HostPrepared,
            LauncherStarted,
            OutputLine,
            FileChunk,
            UserNote,
            RankHeartbeat,
            RankRaised,
            RankStack,
            RankExited,
        ),
        *(CommandExited, AgentSignalled, AgentIdle, AgentExited),
    }
)
"""Messages from an agent."""
