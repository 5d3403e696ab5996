"""Addresses that a part of a run listens on: their checks, before anything is started."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import ClassVar, Protocol

from launcher.errors import ConfigError

_PORTS_TRIED = 50


class Listening(Protocol):
    """A component with the options ``host`` and ``port``."""

    group: ClassVar[str]

    @property
    def host(self) -> str:
        """Address to listen on."""

    @property
    def port(self) -> int:
        """Port to listen on."""

    def error(self, field: str, why: str, fix: str) -> ConfigError:
        """Return the error for one field."""


def validate_port(owner: Listening, *, default: int) -> Iterator[ConfigError]:
    """Yield a number that is no port."""
    if not 0 < owner.port < 65536:
        yield owner.error("port", "must lie between 1 and 65535", f"set {owner.group}.port={default}")


def validate_address(owner: Listening) -> Iterator[ConfigError]:
    """Yield an address that this machine does not have, or a port that cannot be listened on."""
    option, trouble = f"{owner.group}.port", _bind_error(owner.host, owner.port)
    if trouble is None:
        return
    if isinstance(trouble, socket.gaierror) or trouble.errno == 99:  # EADDRNOTAVAIL
        why = f"is not an address of this machine ({trouble.strerror})"
        yield owner.error("host", why, f"set {owner.group}.host=127.0.0.1")
        return
    if isinstance(trouble, PermissionError):
        yield owner.error("port", "only root may listen there", f"set {option}=8000 or another above 1023")
        return
    others = range(owner.port + 1, owner.port + _PORTS_TRIED)
    free = next((port for port in others if _bind_error(owner.host, port) is None), None)
    fix = f"set {option}={free}, which is free" if free else f"set {option} to a free one"
    yield owner.error("port", f"{owner.host}:{owner.port} is already in use", fix)


def http_address(host: str, port: int) -> str:
    """Return the address of a server as clients on its machine type it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bind_error(host: str, port: int) -> OSError | None:
    """Return why the address cannot be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except (OSError, OverflowError, UnicodeError) as error:
        return error if isinstance(error, OSError) else OSError(22, str(error))
    return None
