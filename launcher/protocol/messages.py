"""Messages between the session and host agents."""

from __future__ import annotations

import json
import re
import signal
from typing import Annotated

import msgspec
from msgspec import Meta

from launcher.protocol.plan import HostPlan
from launcher.protocol.session_file import ProcessLocation
from launcher.utils.text import cut_middle

Signal = Annotated[int, Meta(ge=1, lt=signal.NSIG)]
ExitCode = Annotated[int, Meta(ge=0, le=255)]
FailureCode = Annotated[int, Meta(ge=1, le=255)]

MAX_TEXT_CHARS = 1 << 18
"""Longest text of a message that is shown or searched; logs hold the whole."""


def _kind_of(class_name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", class_name).lower()


class AgentMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag=_kind_of):
    """Base of all messages; each is sent as one line of JSON, its kind first: ``rank_exited``."""

    @property
    def kind(self) -> str:
        """Name of the message on the wire: its class's in snake case."""
        return str(self.__struct_config__.tag)

    def encode(self) -> bytes:
        """Return the message as a line."""
        return json.dumps(msgspec.to_builtins(self)).encode() + b"\n"


class Assignment(AgentMessage, frozen=True, kw_only=True):
    """First message to an agent: the processes to start on its host."""

    host: HostPlan
    run_dir: str
    run_id: str
    run_hash: str
    """Expected hash of run.yaml on this host."""
    grace_s: float
    """Time between a signal and the kill if the agent ends the ranks without the session."""
    preempt_grace_s: float | None = None
    """The same after SIGUSR1; ``None`` for ``grace_s``."""
    heartbeat_timeout_s: float
    """Seconds of silence after which the session counts as lost; 0 if a pipe shows its end."""
    env: dict[str, str]
    """Variables of the launching environment, secrets too: no file or command line holds them."""
    files: dict[str, str]
    """Text of files that must be in the run directory, by name."""
    session: ProcessLocation
    """An agent that finds it in session.json shares the disk."""

    def grace_after(self, number: int) -> float:
        """Return the seconds between a signal to the agent, passed on to the ranks, and SIGKILL."""
        if number == signal.SIGUSR1 and self.preempt_grace_s is not None:
            return self.preempt_grace_s
        return self.grace_s


class StartRanks(AgentMessage, frozen=True, kw_only=True):
    """To an agent that is prepared: every host is prepared, so start the ranks."""


class Ping(AgentMessage, frozen=True, kw_only=True):
    """Keepalive, both ways, every second."""


class SessionSuspended(AgentMessage, frozen=True, kw_only=True):
    """To an agent: the session will be suspended (Ctrl-Z); no timeout until its next message."""


class EndRanks(AgentMessage, frozen=True, kw_only=True):
    """To an agent: send a signal to every rank and kill those that still run after ``grace_s``."""

    signal: Signal
    grace_s: float


class DumpStacks(AgentMessage, frozen=True, kw_only=True):
    """To an agent: have every rank dump its stacks, and send them. ``EndRanks`` follows."""

    within_s: float


class FinishAgent(AgentMessage, frozen=True, kw_only=True):
    """To an idle agent: send the exit code of the run to the sidecars, wait for them, and exit."""

    exit_code: ExitCode


class AgentReady(AgentMessage, frozen=True, kw_only=True):
    """From an agent: it runs and receives messages."""

    scratch: str
    """Its temporary folder, which the session removes if the agent is killed."""
    location: ProcessLocation
    code: str
    """Folder of the code to run; a code bundle is unpacked into a folder named by its hash."""


class HostPrepared(AgentMessage, frozen=True, kw_only=True):
    """From an agent: all commands that prepare the host have succeeded."""


class AgentExited(AgentMessage, frozen=True, kw_only=True):
    """From an agent supervisor: its agent has exited, and no process of the run is left there."""

    code: ExitCode | None
    signal: Signal | None


class LauncherStarted(AgentMessage, frozen=True, kw_only=True):
    """From an agent: the launcher of the ranks runs."""

    host: str = ""
    """Host of the ranks, when the agent supervises other hosts than its own."""


class OutputLine(AgentMessage, frozen=True, kw_only=True):
    """From an agent: a whole line that a process wrote."""

    source: int | str
    """The rank, or the name of another process (``prepare``)."""
    text: str


class FileChunk(AgentMessage, frozen=True, kw_only=True):
    """From an agent that shares no disk with the session: bytes of a file in its run directory."""

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


class UserNote(AgentMessage, frozen=True, kw_only=True):
    """From an agent: a sentence for the user."""

    text: str


class RankHeartbeat(AgentMessage, frozen=True, kw_only=True):
    """From an agent: the newest phase and step of a rank."""

    rank: int
    phase: str
    step: int | None
    age_s: float
    """Time since the rank wrote it; clocks of hosts differ."""
    numbers: dict[str, float] = {}


class RankRaised(AgentMessage, frozen=True, kw_only=True):
    """From an agent: a rank recorded its exception; it has not exited yet."""

    rank: int
    time: float
    code: FailureCode
    """Exit code that the rank will return."""
    error: str
    """Type and message."""
    traceback: str


class RankStack(AgentMessage, frozen=True, kw_only=True):
    """From an agent: the stack of a rank, after ``DumpStacks`` or the death of another rank."""

    rank: int
    text: str
    """Stacks of all its threads; empty when it did not answer in time."""
    is_stopped: bool
    """A signal had stopped it."""


class RankExited(AgentMessage, frozen=True, kw_only=True):
    """From an agent: a rank has exited."""

    rank: int
    time: float
    code: ExitCode | None
    """``None`` when a signal ended it."""
    signal: Signal | None
    tail: str
    """The end of its log, when it failed."""
    by_launcher: bool = False
    """Whether its own launcher (torchrun) sent it that signal, so it is not the cause."""


class CommandExited(AgentMessage, frozen=True, kw_only=True):
    """From an agent: a preparing command failed, or the launcher of the ranks exited."""

    name: str
    role: str
    """``prepare`` or ``launcher``."""
    time: float
    code: ExitCode | None
    signal: Signal | None
    tail: str
    reason: str = ""
    """Reason of the failure, where the exit code alone does not explain it."""


class AgentSignalled(AgentMessage, frozen=True, kw_only=True):
    """From an agent: it received a signal, so it ends the run."""

    signal: Signal


class AgentIdle(AgentMessage, frozen=True, kw_only=True):
    """From an agent: every process of the run but the sidecars has exited."""


def with_short_texts(message: AgentMessage) -> AgentMessage:
    """Return ``message`` with long texts cut in the middle; files and output stay whole."""
    if isinstance(message, FileChunk | OutputLine):
        return message
    long = {
        name: cut_middle(value, limit=MAX_TEXT_CHARS)
        for name, value in msgspec.structs.asdict(message).items()
        if isinstance(value, str) and len(value) > MAX_TEXT_CHARS
    }
    return msgspec.structs.replace(message, **long) if long else message


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
