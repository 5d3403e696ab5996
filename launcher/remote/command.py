"""The command that runs a module on a host, and the header written to its stdin.

A remote command line passes through the login shell of the host, whichever that is, and is visible in its process list.
So it holds only the interpreter's path and a constant line of Python. That line reads the first line of stdin, a JSON
string with the source of ``on_host.py``, and executes it; ``on_host.py`` reads the second line.

    stdin:  "source of on_host.py" ⏎  {"module": …, "cwd": …, …} ⏎  code, if it is sent  stdin of the module …

The ssh command is OpenSSH with the user's own configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import ConfigError
from launcher.protocol.plan import Host
from launcher.remote.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class RemoteCommand:
    """A command line of this machine that starts a module on a host."""

    argv: tuple[str, ...]
    """Executed directly, not through a shell of this machine."""
    prologue: bytes = b""
    """Bytes written first to its stdin."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables of the command, beside those of this process."""


ONE_LINER = "import json,os;exec(json.loads(bytes(iter(lambda:os.read(0,1)[0],10))))"
"""Python one-liner that reads its line byte by byte, so that the rest stays unread.
It holds nothing that sh, bash, csh, fish or zsh would touch between single quotes, where csh still expands ``!`` and
fish the backslash."""

_PLAIN_PATH = re.compile(r"(~/)?[A-Za-z0-9_@%+:,./-]+")
_UNQUOTABLE = re.compile(r"['\\!\x00-\x1f\x7f]")


def shell_command(python: str) -> str:
    """Return the command that any login shell runs; ``python`` may begin with ``~/``.

    ``-I`` keeps a ``json.py`` in the home directory from being imported instead of the real one.

    Raises:
        ConfigError: a path that cannot be quoted for every shell.
    """
    if _UNQUOTABLE.search(python) or python.startswith("-"):
        fix = "use a path without quotes, backslashes and exclamation marks, or a link with such a path"
        raise ConfigError("backend.python", python, why="cannot be quoted for every login shell", fix=fix)
    word = python if _PLAIN_PATH.fullmatch(python) else f"'{python}'"
    return f"exec {word} -I -c '{ONE_LINER}'"


def prologue(
    module: str,
    *,
    cwd: str,
    pythonpath: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    bundle: Bundle | None = None,
) -> bytes:
    """Return the bytes that make the host run ``python -m module``.

    Args:
        module: reads the rest of stdin.
        cwd: the working directory, if it exists; if it does not and the code is shared, the host prints a warning.
        pythonpath: folders on the host that come first in PYTHONPATH.
        env: other variables of the module.
        bundle: the code, for hosts that do not share it; it precedes ``pythonpath``.
    """
    source = Path(__file__).with_name("on_host.py").read_text(encoding="utf-8")
    sent = None if bundle is None else {"sha256": bundle.sha256, "num_bytes": len(bundle.payload)}
    header = {"module": module, "cwd": cwd, "pythonpath": list(pythonpath), "env": dict(env or {}), "bundle": sent}
    lines = f"{json.dumps(source)}\n{json.dumps(header)}\n"
    return lines.encode("ascii") + (b"" if bundle is None else bundle.payload)


_SSH_OPTIONS = (
    "-T",  # a terminal would change bytes
    *("-o", "BatchMode=yes"),  # fail instead of asking for a password
    *("-o", "ControlPath=none"),  # no shared connection: it outlives this process, and ends all others with it
    *("-o", "RemoteCommand=none"),
    *("-o", "ClearAllForwardings=yes"),  # many connections at once cannot all bind the ports of a LocalForward
)

_LOGIN = re.compile(r"(?P<user>[^@]+@)?(?:\[(?P<ipv6>[^\]]+)\]|(?P<name>[^:\[\]]+))(?::(?P<port>\d+))?")


def ssh_command(
    host: Host, *, prologue: bytes, config: str | None = None, options: Sequence[str] = ()
) -> RemoteCommand:
    """Return the ssh command that runs ``prologue`` on ``host``.

    Of an option given twice, ssh takes the first: the launcher's, then ``options``, then the user's configuration.

    Args:
        host: with a ``login``.
        prologue: returned by :func:`prologue`.
        config: a file used instead of ``~/.ssh/config``.
        options: more arguments of ssh, one word each (``-i``, ``~/.ssh/id_cluster``).
    """
    destination, port = split_login(host.ssh_destination)
    argv = (
        *("ssh", *_SSH_OPTIONS),
        *(("-F", config) if config else ()),
        *options,
        *(("-p", port) if port else ()),
        *("--", destination, shell_command(host.python)),
    )
    return RemoteCommand(argv=argv, prologue=prologue)


def split_login(login: str) -> tuple[str, str | None]:
    """Return destination and port of ``user@name:port``.

    ssh takes an IPv6 address without brackets.
    """
    found = _LOGIN.fullmatch(login)
    assert found is not None, f"the hostfile let {login!r} through"
    return f"{found['user'] or ''}{found['ipv6'] or found['name']}", found["port"]
