"""What session and host agents tell each other: one JSON object a line, so that any pipe can carry it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Message:
    """One line."""

    kind: ClassVar[str]

    def encode(self) -> bytes:
        """Return the line."""
        return json.dumps({"kind": self.kind, **asdict(self)}).encode() + b"\n"


@dataclass(frozen=True, kw_only=True)
class Assignment(Message):
    """To an agent, first: what to start."""

    kind: ClassVar[str] = "assignment"
    host: dict[str, Any]
    """The ``HostPlan``, as a plain tree."""
    run_dir: str
    run_id: str
    grace_s: float
    """Used when nobody can be asked: the session, or the launcher of the ranks, is gone."""


@dataclass(frozen=True, kw_only=True)
class End(Message):
    """To an agent: send a signal to every rank and kill what is left after ``grace_s``."""

    kind: ClassVar[str] = "end"
    signal: int
    grace_s: float


@dataclass(frozen=True, kw_only=True)
class Dump(Message):
    """To an agent: have every rank write its Python stacks to its log."""

    kind: ClassVar[str] = "dump"


@dataclass(frozen=True, kw_only=True)
class Finish(Message):
    """To an idle agent: tell the sidecars how the run ended, wait for them, and go."""

    kind: ClassVar[str] = "finish"
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class Ready(Message):
    """From an agent: it listens."""

    kind: ClassVar[str] = "ready"
    scratch: str
    """Its temporary folder, to be removed by others should it be killed."""


@dataclass(frozen=True, kw_only=True)
class Started(Message):
    """From an agent: preparation is done, the launcher of the ranks runs."""

    kind: ClassVar[str] = "started"


@dataclass(frozen=True, kw_only=True)
class Line(Message):
    """From an agent: a whole line that a process wrote."""

    kind: ClassVar[str] = "line"
    who: int | str
    """The rank, or what else wrote it (``prepare``)."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Note(Message):
    """From an agent: a sentence for the user."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True, kw_only=True)
class RankBeat(Message):
    """From an agent: where a rank is."""

    kind: ClassVar[str] = "beat"
    rank: int
    phase: str
    step: int | None
    age_s: float
    """Time since the rank said so; clocks of hosts differ."""
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RankRaised(Message):
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
class RankEnded(Message):
    """From an agent: a rank is gone."""

    kind: ClassVar[str] = "rank_ended"
    rank: int
    time: float
    code: int | None
    """``None`` when a signal ended it."""
    signal: int | None
    tail: str
    """The end of its log, when it did not end well."""


@dataclass(frozen=True, kw_only=True)
class CommandEnded(Message):
    """From an agent: a preparation failed, or the launcher of the ranks ended."""

    kind: ClassVar[str] = "command_ended"
    name: str
    role: str
    """``prepare`` or ``launcher``."""
    time: float
    code: int | None
    signal: int | None
    tail: str


@dataclass(frozen=True, kw_only=True)
class AgentSignalled(Message):
    """From an agent: somebody sent it a signal, so it ends the run."""

    kind: ClassVar[str] = "agent_signalled"
    signal: int


@dataclass(frozen=True, kw_only=True)
class Idle(Message):
    """From an agent: every process but the sidecars is gone."""

    kind: ClassVar[str] = "idle"


_KINDS: dict[str, type[Message]] = {
    cls.kind: cls
    for cls in (
        *(Assignment, End, Dump, Finish),
        *(Ready, Started, Line, Note, RankBeat, RankRaised, RankEnded, CommandEnded, AgentSignalled, Idle),
    )
}


def decode(line: bytes | str) -> Message:
    """Return the message that a line holds."""
    tree = json.loads(line)
    return _KINDS[tree.pop("kind")](**tree)
