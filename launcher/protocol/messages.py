"""Messages between the session and host agents."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class AgentMessage:
    """One line."""

    kind: ClassVar[str]

    def encode(self) -> bytes:
        """Return the line."""
        return json.dumps({"kind": self.kind, **asdict(self)}).encode() + b"\n"


@dataclass(frozen=True, kw_only=True)
class Assignment(AgentMessage):
    """To an agent, first: what to start."""

    kind: ClassVar[str] = "assignment"
    host: dict[str, Any]
    """The ``HostPlan``, as a plain tree."""
    run_dir: str
    run_id: str
    run_hash: str
    """What run.yaml must hash to, here too."""
    grace_s: float
    """Used when the session, or the launcher of the ranks, is gone."""
    heartbeat_timeout_s: float
    """Silence of the session after which it counts as gone; 0 where the pipe itself reports it."""
    env: dict[str, str]
    """Variables of the launching environment, secrets too: this message is the only place they are written to."""
    files: dict[str, str]
    """Text of files that must be in the run directory, by name."""
    session: dict[str, Any]
    """The ``ProcessPlace`` of the session: an agent that finds it in session.json shares the disk."""


@dataclass(frozen=True, kw_only=True)
class StartRanks(AgentMessage):
    """To an agent that is prepared: every host is, so start the ranks."""

    kind: ClassVar[str] = "start"


@dataclass(frozen=True, kw_only=True)
class Ping(AgentMessage):
    """Both ways, every second: I am there."""

    kind: ClassVar[str] = "ping"


@dataclass(frozen=True, kw_only=True)
class SessionSuspended(AgentMessage):
    """To an agent: the session is being stopped (Ctrl-Z) and will be silent until its next word."""

    kind: ClassVar[str] = "hold"


@dataclass(frozen=True, kw_only=True)
class EndRanks(AgentMessage):
    """To an agent: send a signal to every rank and kill what is left after ``grace_s``."""

    kind: ClassVar[str] = "end"
    signal: int
    grace_s: float


@dataclass(frozen=True, kw_only=True)
class DumpStacks(AgentMessage):
    """To an agent: have every rank write its Python stacks to its log, and send them. What comes next is ``End``."""

    kind: ClassVar[str] = "dump"
    within_s: float


@dataclass(frozen=True, kw_only=True)
class FinishAgent(AgentMessage):
    """To an idle agent: send the sidecars the outcome, wait for them, and exit."""

    kind: ClassVar[str] = "finish"
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class AgentReady(AgentMessage):
    """From an agent: it listens."""

    kind: ClassVar[str] = "ready"
    scratch: str
    """Its temporary folder, to be removed by others should it be killed."""
    place: dict[str, Any]
    """The ``ProcessPlace`` of the agent, as a plain tree."""
    code: str
    """Folder of the program it runs; code that was sent lies in one named by its hash."""


@dataclass(frozen=True, kw_only=True)
class HostPrepared(AgentMessage):
    """From an agent: what comes before the ranks is done."""

    kind: ClassVar[str] = "prepared"


@dataclass(frozen=True, kw_only=True)
class AgentExited(AgentMessage):
    """From the warden of a host: its agent has ended, and nothing of the run is left there."""

    kind: ClassVar[str] = "agent_gone"
    code: int | None
    signal: int | None


@dataclass(frozen=True, kw_only=True)
class LauncherStarted(AgentMessage):
    """From an agent: the launcher of the ranks runs."""

    kind: ClassVar[str] = "started"
    host: str = ""
    """Whose ranks, where the agent watches over other hosts than its own."""


@dataclass(frozen=True, kw_only=True)
class OutputLine(AgentMessage):
    """From an agent: a whole line that a process wrote."""

    kind: ClassVar[str] = "line"
    who: int | str
    """The rank, or what else wrote it (``prepare``)."""
    text: str


@dataclass(frozen=True, kw_only=True)
class FileChunk(AgentMessage):
    """From an agent that shares no disk with the session: bytes of a file in its run directory."""

    kind: ClassVar[str] = "file_part"
    path: str
    """Relative to the run directory."""
    offset: int | None
    """Where they belong; ``None`` is the end of what is there."""
    data: str
    """In base64."""
    size: int
    """Of the whole file, in bytes, when they were read."""
    grows: bool
    """The file only grows; any other is replaced once all of it has arrived."""


@dataclass(frozen=True, kw_only=True)
class UserNote(AgentMessage):
    """From an agent: a sentence for the user."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True, kw_only=True)
class RankHeartbeat(AgentMessage):
    """From an agent: where a rank is."""

    kind: ClassVar[str] = "heartbeat"
    rank: int
    phase: str
    step: int | None
    age_s: float
    """Time since the rank said so; clocks of hosts differ."""
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RankRaised(AgentMessage):
    """From an agent: a rank wrote down its exception; it has not ended yet."""

    kind: ClassVar[str] = "raised"
    rank: int
    time: float
    code: int
    """What it is going to exit with."""
    error: str
    """Type and message."""
    traceback: str


@dataclass(frozen=True, kw_only=True)
class RankStack(AgentMessage):
    """From an agent: the answer of a rank to ``Dump``, and of those beside a rank that died without a word."""

    kind: ClassVar[str] = "stack"
    rank: int
    text: str
    """Stacks of all its threads; empty when it did not answer in time."""
    is_stopped: bool
    """A signal had stopped it."""


@dataclass(frozen=True, kw_only=True)
class RankExited(AgentMessage):
    """From an agent: a rank is gone."""

    kind: ClassVar[str] = "rank_ended"
    rank: int
    time: float
    code: int | None
    """``None`` when a signal ended it."""
    signal: int | None
    tail: str
    """The end of its log, when it did not end well."""
    by_launcher: bool = False
    """Whether torchrun, or whatever started it, had sent it that signal: it is not the cause."""


@dataclass(frozen=True, kw_only=True)
class CommandExited(AgentMessage):
    """From an agent: a preparation failed, or the launcher of the ranks ended."""

    kind: ClassVar[str] = "command_ended"
    name: str
    role: str
    """``prepare`` or ``launcher``."""
    time: float
    code: int | None
    signal: int | None
    tail: str
    why: str = ""
    """Text to show instead of the exit status, where that does not give the reason."""


@dataclass(frozen=True, kw_only=True)
class AgentSignalled(AgentMessage):
    """From an agent: it received a signal, so it ends the run."""

    kind: ClassVar[str] = "agent_signalled"
    signal: int


@dataclass(frozen=True, kw_only=True)
class AgentIdle(AgentMessage):
    """From an agent: every process but the sidecars is gone."""

    kind: ClassVar[str] = "idle"


TO_AGENT: frozenset[type[AgentMessage]] = frozenset(
    {Assignment, StartRanks, Ping, SessionSuspended, EndRanks, DumpStacks, FinishAgent}
)
"""What a session sends."""


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
"""What an agent sends."""
