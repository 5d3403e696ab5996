"""What session and host agents tell each other: one JSON object a line, so that any pipe can carry it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import signal
import types
import typing
from collections.abc import Callable, Collection, Mapping
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
    run_hash: str
    """What run.yaml must hash to, here too."""
    grace_s: float
    """Used when nobody can be asked: the session, or the launcher of the ranks, is gone."""
    heartbeat_timeout_s: float
    """Silence of the session after which it counts as gone; 0 where the pipe itself would tell."""
    env: dict[str, str]
    """Variables of the launching environment, secrets too: this message is the only place they are written to."""
    files: dict[str, str]
    """Text of files that must be in the run directory, by name."""
    session: dict[str, Any]
    """The ``ProcessPlace`` of the session: an agent that finds it in session.json shares the disk."""


@dataclass(frozen=True, kw_only=True)
class Start(Message):
    """To an agent that is prepared: every host is, so start the ranks."""

    kind: ClassVar[str] = "start"


@dataclass(frozen=True, kw_only=True)
class Ping(Message):
    """Both ways, every second: I am there."""

    kind: ClassVar[str] = "ping"


@dataclass(frozen=True, kw_only=True)
class Hold(Message):
    """To an agent: the session is being stopped (Ctrl-Z) and will be silent until its next word."""

    kind: ClassVar[str] = "hold"


@dataclass(frozen=True, kw_only=True)
class End(Message):
    """To an agent: send a signal to every rank and kill what is left after ``grace_s``."""

    kind: ClassVar[str] = "end"
    signal: int
    grace_s: float


@dataclass(frozen=True, kw_only=True)
class Dump(Message):
    """To an agent: have every rank write its Python stacks to its log, and send them. What comes next is ``End``."""

    kind: ClassVar[str] = "dump"
    within_s: float


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
    place: dict[str, Any]
    """The ``ProcessPlace`` of the agent, as a plain tree."""
    code: str
    """Folder of the program it runs; code that was sent lies in one named by its hash."""


@dataclass(frozen=True, kw_only=True)
class Prepared(Message):
    """From an agent: what comes before the ranks is done."""

    kind: ClassVar[str] = "prepared"


@dataclass(frozen=True, kw_only=True)
class AgentGone(Message):
    """From the warden of a host: its agent has ended, and nothing of the run is left there."""

    kind: ClassVar[str] = "agent_gone"
    code: int | None
    signal: int | None


@dataclass(frozen=True, kw_only=True)
class Started(Message):
    """From an agent: the launcher of the ranks runs."""

    kind: ClassVar[str] = "started"
    host: str = ""
    """Whose ranks, where the agent watches over other hosts than its own."""


@dataclass(frozen=True, kw_only=True)
class Line(Message):
    """From an agent: a whole line that a process wrote."""

    kind: ClassVar[str] = "line"
    who: int | str
    """The rank, or what else wrote it (``prepare``)."""
    text: str


@dataclass(frozen=True, kw_only=True)
class FilePart(Message):
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
class RankStack(Message):
    """From an agent: the answer of a rank to ``Dump``, and of those beside a rank that died without a word."""

    kind: ClassVar[str] = "stack"
    rank: int
    text: str
    """Stacks of all its threads; empty when it did not answer in time."""
    is_stopped: bool
    """A signal had stopped it."""


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
    by_launcher: bool = False
    """Whether torchrun, or whatever started it, had sent it that signal: it is not the cause."""


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
    why: str = ""
    """What to say instead of how it ended, where that would not tell the reason."""


@dataclass(frozen=True, kw_only=True)
class AgentSignalled(Message):
    """From an agent: somebody sent it a signal, so it ends the run."""

    kind: ClassVar[str] = "agent_signalled"
    signal: int


@dataclass(frozen=True, kw_only=True)
class Idle(Message):
    """From an agent: every process but the sidecars is gone."""

    kind: ClassVar[str] = "idle"


TO_AGENT: frozenset[type[Message]] = frozenset({Assignment, Start, Ping, Hold, End, Dump, Finish})
"""What a session sends."""

FROM_AGENT: frozenset[type[Message]] = frozenset(
    {
        *(Ping, Ready, Prepared, Started, Line, FilePart, Note, RankBeat, RankRaised, RankStack, RankEnded),
        *(CommandEnded, AgentSignalled, Idle, AgentGone),
    }
)
"""What an agent sends."""

_KINDS: dict[str, type[Message]] = {cls.kind: cls for cls in TO_AGENT | FROM_AGENT}
_MAX_INT = 2**63
_FIELDS_OF_SIGNALS = ("signal",)
_MOST_SHOWN = 80


class MalformedMessage(ValueError):
    """A peer sent what is no message; the text says why."""


def decode(line: bytes | str, *, accepts: Collection[type[Message]] = TO_AGENT | FROM_AGENT) -> Message:
    """Return the message that a line holds, every field of its declared type.

    Args:
        line: a JSON object.
        accepts: the classes of messages that this side may be sent.

    Raises:
        MalformedMessage: the line holds anything else.
    """
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"a line that is not JSON: {_shown(line)}") from error
    if not isinstance(tree, dict):
        raise MalformedMessage(f"a line that is not an object: {_shown(line)}")
    kind = tree.pop("kind", None)
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None or cls not in accepts:
        raise MalformedMessage(f"a message of the kind {_shown(repr(kind))}, which is not expected from that side")
    fields = _fields(cls.kind)
    if wrong := [name for name, check in fields.items() if name in tree and not check(tree[name])]:
        raise MalformedMessage(f"a message {kind} whose {wrong[0]} is {_shown(repr(tree[wrong[0]]))}")
    try:
        return cls(**tree)
    except TypeError as error:  # a field too many or too few
        raise MalformedMessage(f"a message {kind} with other fields than {', '.join(fields) or 'none'}") from error


def require_fields(tree: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that ``tree`` has every field of ``wanted``, each of the type it names.

    Raises:
        MalformedMessage: it lacks one, or holds something else there.
    """
    for name, hint in wanted.items():
        if name not in tree or not _check(hint)(tree[name]):
            raise MalformedMessage(f"a message whose {name} is {_shown(repr(tree.get(name)))}")


@functools.cache
def _fields(kind: str) -> dict[str, Callable[[Any], bool]]:
    """Return what each field of a message must satisfy."""
    cls = _KINDS[kind]
    hints = typing.get_type_hints(cls)
    checks = {field.name: _check(hints[field.name]) for field in dataclasses.fields(cls)}
    for name in checks.keys() & set(_FIELDS_OF_SIGNALS):
        checks[name] = functools.partial(_is_signal, optional=hints[name] is not int)
    return checks


@functools.cache
def _check(hint: Any) -> Callable[[Any], bool]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        choices = [_check(choice) for choice in arguments]
        return lambda value: any(choice(value) for choice in choices)
    if origin is list:
        element = _check(arguments[0])
        return lambda value: isinstance(value, list) and all(map(element, value))
    if origin is dict:
        item = _check(arguments[1])
        return lambda value: isinstance(value, dict) and all(map(item, value.values()))
    if hint is Any:
        return lambda value: True
    if hint is float:
        return lambda value: (type(value) is float and math.isfinite(value)) or _is_int(value)
    return _is_int if hint is int else lambda value: type(value) is hint


def _is_int(value: Any) -> bool:
    return type(value) is int and -_MAX_INT <= value < _MAX_INT


def _is_signal(value: Any, *, optional: bool) -> bool:
    return (value is None and optional) or (_is_int(value) and 0 < value < signal.NSIG)


def _shown(line: bytes | str) -> str:
    text = line.decode(errors="replace") if isinstance(line, bytes) else line
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}… ({len(line)} characters)"
