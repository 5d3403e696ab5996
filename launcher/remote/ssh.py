"""The ssh command that runs a module on a host: OpenSSH, with the user's own configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence

from launcher.plan import Host
from launcher.remote.bootstrap import shell_command
from launcher.remote.command import Remote

_OURS = (
    "-T",  # a terminal would change bytes on their way
    *("-o", "BatchMode=yes"),  # fail instead of asking for a password that nobody is there to type
    *("-o", "ControlPath=none"),  # a connection of its own: a shared one outlives us, and takes all others with it
    *("-o", "RemoteCommand=none"),
    *("-o", "ClearAllForwardings=yes"),  # many connections at once cannot all bind the ports of a LocalForward
)
_LOGIN = re.compile(r"(?P<user>[^@]+@)?(?:\[(?P<ipv6>[^\]]+)\]|(?P<name>[^:\[\]]+))(?::(?P<port>\d+))?")


def ssh_remote(host: Host, *, prologue: bytes, config: str | None = None, options: Sequence[str] = ()) -> Remote:
    """Return how to run on ``host`` what ``prologue`` says.

    Of an option given twice, ssh takes the first: ours, then ``options``, then the user's configuration.

    Args:
        host: with a ``login``.
        prologue: as ``bootstrap.prologue`` made it.
        config: a file to be used instead of ``~/.ssh/config``.
        options: more arguments of ssh, one word each (``-i``, ``~/.ssh/id_cluster``).
    """
    destination, port = split_login(host.login)
    argv = (
        *("ssh", *_OURS),
        *(("-F", config) if config else ()),
        *options,
        *(("-p", port) if port else ()),
        *("--", destination, shell_command(host.python)),
    )
    return Remote(argv=argv, prologue=prologue)


def split_login(login: str) -> tuple[str, str | None]:
    """Return destination and port of ``user@name:port``; ssh takes an IPv6 address without its brackets."""
    found = _LOGIN.fullmatch(login)
    assert found is not None, f"the hostfile let {login!r} through"
    return f"{found['user'] or ''}{found['ipv6'] or found['name']}", found["port"]
