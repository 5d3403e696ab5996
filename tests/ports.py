"""Ports for the servers of tests: free, and not taken by a connection meanwhile."""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterator

_FIRST, _EACH, _NUM_WORKERS = 10_000, 2_000, 9
"""Below the ports that Linux gives to connections (32768), one of which may take a port between its choice and its use.
Each worker of pytest has a range of its own; together they end below the default ports of PyTorch (29400, 29500)."""


def _candidates() -> Iterator[int]:
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    start = random.randrange(_EACH)  # another run of the tests on this machine begins elsewhere
    for offset in itertools.count(start):
        yield _FIRST + number % _NUM_WORKERS * _EACH + offset % _EACH


_ports = _candidates()


def free_port(*, together: int = 1) -> int:
    """Return a port that no process listens on and that no other call returns, the first of so many in a row."""
    found: list[int] = []
    for port in itertools.islice(_ports, _EACH):
        is_next = not found or port == found[-1] + 1
        found = ([*found, port] if is_next else [port]) if _is_free(port) else []
        if len(found) == together:
            return found[0]
    raise RuntimeError(f"no {together} of the {_EACH} ports of this worker are free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
