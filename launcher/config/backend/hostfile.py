"""The hostfile: machines, slots of each, and filters over them, in DeepSpeed's format.

Both come from users' files and command lines and end as arguments of ssh, so names are checked here, character by
character: nothing that could be taken for an option or for shell syntax gets through.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import ConfigError, ConfigErrors
from launcher.utils.text import did_you_mean

_MAX_SLOTS = 4096
"""More on one host is a slip of the keyboard."""

_OPTION = "backend.hostfile"
_PORT_FIX = "give a whole number from 1 to 65535, or none for port 22"
_AS = "write the line as: "
_MOST_PROCESSES = 512
"""A port below is more likely a number of processes: ssh's is 22 or above 1023."""
_FORM = "write [user@]host[:port] slots=N, as in hostfile.example"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_LOGIN = re.compile(r"(?:(?P<user>[^@]*)@)?(?:\[(?P<ipv6>[^\]]*)\]|(?P<name>[^:\[\]]*))(?::(?P<port>.*))?")
_RANGE = re.compile(r"([^\[\]]+)\[(\w+)[-,][\w,-]*\].*")
"""``node[1-3]``: its hosts begin with the two groups put together."""
_NODE = re.compile(r"(?:\[(?P<ipv6>[^\]]*)\]|(?P<name>[^:\[\]]*))(?::(?P<slots>.*))?")


@dataclass(frozen=True, kw_only=True)
class HostfileEntry:
    """One host of a hostfile."""

    name: str
    """Host name, address or ssh alias; an IPv6 address without its brackets."""
    slots: int
    """Ranks it takes."""
    devices: tuple[int, ...]
    """Indices of its slots, one a rank: they count the devices that are visible on the host."""
    line: int
    """Line in the file, from 1."""
    ssh_destination: str
    """``user@name:port`` as typed."""
    user: str | None = None
    port: int | None = None


class _EntryError(Exception):
    """Why one line or one word of a filter cannot be meant, and what could be."""

    def __init__(self, why: str, fix: str = _FORM) -> None:
        super().__init__(why)
        self.why, self.fix = why, fix


def read_hostfile(path: str | Path) -> tuple[HostfileEntry, ...]:
    """Return the hosts of a hostfile, in its order.

    Raises:
        ConfigError: the file is missing, cannot be read, or names no host.
        ConfigErrors: every line that is wrong.
    """
    lines = _text(Path(path).expanduser()).splitlines()
    entries: dict[str, HostfileEntry] = {}
    mistakes: list[ConfigError] = []
    parsed = [line.partition("#")[0].split() for line in lines]
    alone = Counter(words[0] for words in parsed if len(words) == 1)  # a line for each slot, as PBS writes them
    repeated = {word: times for word, times in alone.items() if times > 1}
    for number, words in enumerate(parsed, start=1):
        if not words or (len(words) == 1 and repeated.get(words[0]) == 0):
            continue
        try:
            if len(words) == 1 and (times := repeated.get(words[0])):
                repeated[words[0]] = 0  # said once
                fix = f"replace these lines by one: {words[0]} slots={times}"
                raise _EntryError(f"{words[0]} has no slots=N, and is on {times} lines", fix)
            entry = _entry(words, number)
            if known := entries.get(entry.name.lower()):
                fix = "write one line with all of its slots; if these are two machines, use an ssh alias for each"
                raise _EntryError(f"{entry.name} is already on line {known.line}", fix)
            entries[entry.name.lower()] = entry
        except _EntryError as wrong:
            mistakes.append(ConfigError(_OPTION, path, why=wrong.why, fix=wrong.fix, source=f"{path}:{number}"))
    if mistakes:
        raise ConfigErrors(mistakes)
    if not entries:
        raise ConfigError(_OPTION, path, why="names no host", fix=f"{_FORM}, one host per line")
    return tuple(entries.values())


def filter_hosts(
    entries: Sequence[HostfileEntry], *, include: str | None = None, exclude: str | None = None
) -> tuple[HostfileEntry, ...]:
    """Return the hosts and slots that the filters leave, in the order of the hostfile.

    A filter is ``HOST[:SLOT,SLOT…]@HOST…``; a host without slots means all of them (DeepSpeed's ``--include`` and
    ``--exclude``). Hosts left without a slot drop out.

    Raises:
        ConfigErrors: both filters at once, an unknown host or slot, or no host left.
    """
    if include is not None and exclude is not None:
        why = f"cannot be used together with backend.exclude={exclude}"
        raise ConfigError("backend.include", include, why=why, fix="use one of them")
    if include is None and exclude is None:
        return tuple(entries)
    option, given = ("backend.include", include) if include is not None else ("backend.exclude", exclude)
    named = _named_slots(entries, option, given or "")
    left = []
    for entry in entries:
        slots = named.get(entry.name, set())
        devices = tuple(slot for slot in entry.devices if (slot in slots) == (include is not None))
        if devices:
            left.append(replace(entry, slots=len(devices), devices=devices))
    if not left:
        raise ConfigError(option, given, why="leaves no host", fix="keep at least one slot of one host")
    return tuple(left)


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        fix = "name a file with one host per line (host slots=N), as hostfile.example shows"
        raise ConfigError(_OPTION, path, why=error.strerror or "cannot be read", fix=fix) from error
    except UnicodeDecodeError as error:
        raise ConfigError(_OPTION, path, why="is not a text file", fix=_FORM) from error
    if "\0" in text:
        raise ConfigError(_OPTION, path, why="is not a text file", fix=_FORM)
    return text


def _entry(words: Sequence[str], line: int) -> HostfileEntry:
    login, *settings = words
    user, name, port = _login(login)
    slots = None
    known = [word for word in settings if word.startswith("slots=")]
    for word in settings:
        key, equals, value = word.partition("=")
        if key != "slots" or not equals:
            of_mpich = port is not None and port <= _MOST_PROCESSES and "slots" not in "".join(settings)
            if of_mpich:  # its number of processes, which is no port here
                known, login = [f"slots={port}"], login.rpartition(":")[0]
            raise _EntryError(f"{word!r} is not recognized", _without(login, known, settings, word))
        if slots is not None:
            raise _EntryError(f"{name} sets slots twice")
        fix = f"give a whole number from 1 to {_MAX_SLOTS}, or put # before the host to leave it out"
        slots = _number(value, "slots", range(1, _MAX_SLOTS + 1), fix)
    if slots is None and port is not None and port <= _MOST_PROCESSES:
        host = login.rpartition(":")[0]
        fix = f"{_AS}{host} slots={port} (here the number after the colon is ssh's port: {login} slots=N)"
        raise _EntryError(
            f"{name} has no slots; if this is a hostfile of MPICH, {port} is its number of processes", fix
        )
    if slots is None:
        raise _EntryError(f"{name} has no slots", f"write {login} slots=N")
    devices = tuple(range(slots))
    return HostfileEntry(
        name=name, slots=slots, devices=devices, line=line, ssh_destination=login, user=user, port=port
    )


def _without(login: str, known: Sequence[str], settings: Sequence[str], word: str) -> str:
    """Return how to write a line with another program's setting (Open MPI's ``max_slots=8``)."""
    given = dict(setting.split("=", 1) for setting in settings if re.fullmatch(r"(user|port)=[\w.-]+", setting))
    if given and "@" not in login and ":" not in login:  # they belong to the host here
        user, port = given.get("user"), given.get("port")
        login = f"{f'{user}@' if user else ''}{login}{f':{port}' if port else ''}"
    if len(known) == 1:
        return f"{_AS}{login} {known[0]}"
    joined = "".join(settings)  # "slots = 4"
    if not known and re.fullmatch(r"slots=[0-9]+", joined):
        return f"{_AS}{login} {joined}"
    value = word.partition("=")[2] or word  # "node1 4", as LAM and Grid Engine write it
    number = value if value.isascii() and value.isdigit() else "N"
    return f"did you mean slots={number}? {_AS}{login} slots={number}"


def _login(word: str) -> tuple[str | None, str, int | None]:
    """Return user, host and port of ``user@host:port``."""
    if "=" in word:
        raise _EntryError(f"the line begins with {word!r} instead of a host")
    found = _LOGIN.fullmatch(word)
    if ranged := _RANGE.fullmatch(word):
        fix = f"write a line for each of its hosts: {ranged[1]}{ranged[2]} slots=N, …"
        raise _EntryError(f"{word!r} is a range of hosts, as in Slurm and pdsh", fix)
    if found is None:
        raise _EntryError(f"{word!r} is not a host", "write IPv6 addresses in brackets: [fd00::1]:22")
    user, port = found["user"], found["port"]
    if user is not None and ":" in user:
        raise _EntryError("there is a password before a host", "remove it: ssh logs in with a key or an agent")
    if user is not None and not _NAME.fullmatch(user):
        raise _EntryError(f"{user!r} is not a user name", "use letters, digits, dots, dashes and underscores")
    if port is not None and ":" in port and found["ipv6"] is None:
        raise _EntryError(f"{word!r} has more than one colon", "write IPv6 addresses in brackets: [fd00::1]:22")
    name = _ipv6(found["ipv6"]) if found["ipv6"] is not None else _host_name(found["name"])
    return user, name, None if port is None else _number(port, "the port", range(1, 65536), _PORT_FIX)


def _host_name(text: str) -> str:
    if text.startswith("-"):
        raise _EntryError(
            f"{text!r} begins with a dash, so ssh would take it for an option", "give the host's own name"
        )
    if not _NAME.fullmatch(text):
        fix = "use a name of letters, digits, dots, dashes and underscores, an address, or an ssh alias"
        raise _EntryError(f"{text!r} is not a host name", fix)
    return text


def _ipv6(text: str) -> str:
    _, percent, zone = text.partition("%")
    try:
        address = str(ipaddress.IPv6Address(text))  # one spelling, so that no host is listed twice
    except ValueError as error:
        raise _EntryError(f"[{text}] is not an IPv6 address: {error}", "write it like [fd00::1]") from error
    if percent and not _NAME.fullmatch(zone):
        raise _EntryError(f"{zone!r} is not a network interface", "write it like [fe80::1%eth0]")
    return address


def _number(text: str, what: str, allowed: range, fix: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise _EntryError(f"{what} is {text!r}, not a number", fix)
    if int(text) not in allowed:
        raise _EntryError(f"{what} is {text}", fix)
    return int(text)


def _named_slots(entries: Sequence[HostfileEntry], option: str, given: str) -> dict[str, set[int]]:
    """Return the slots that a filter names, by host.

    Raises:
        ConfigErrors: every word that names nothing.
    """
    named: dict[str, set[int]] = {}
    mistakes: list[ConfigError] = []
    for word in given.split("@"):
        try:
            entry, slots = _node(entries, word.strip())
            named.setdefault(entry.name, set()).update(slots)
        except _EntryError as wrong:
            error = ConfigError(option, given, why=wrong.why, fix=wrong.fix)
            mistakes += [error] if str(error) not in map(str, mistakes) else []
    if mistakes:
        raise ConfigErrors(mistakes)
    return named


def _node(entries: Sequence[HostfileEntry], word: str) -> tuple[HostfileEntry, Iterator[int]]:
    found = _NODE.fullmatch(word)
    name = word if found is None else found["name"] if found["ipv6"] is None else _ipv6(found["ipv6"])
    entry = next((entry for entry in entries if entry.name.lower() == name.lower()), None)
    if not name:
        raise _EntryError("names no host", "write HOST or HOST:SLOT,SLOT, with @ between hosts")
    if entry is None:
        raise _EntryError(f"{name} is not in the hostfile", did_you_mean(name, [entry.name for entry in entries]))
    if found is None or found["slots"] is None:
        return entry, iter(entry.devices)
    return entry, _slots(entry, found["slots"])


def _slots(entry: HostfileEntry, text: str) -> Iterator[int]:
    known = ",".join(map(str, entry.devices)) if entry.slots <= 8 else f"0 to {entry.devices[-1]}"
    for word in (word.strip() for word in text.split(",")):
        if not re.fullmatch(r"[0-9]{1,9}", word) or int(word) not in entry.devices:
            fix = f"its slots are {known}, written one by one with commas (line {entry.line})"
            raise _EntryError(f"{entry.name} has no slot {word!r}", fix)
        yield int(word)
