"""What the program asks of this machine."""

import socket
from pathlib import Path

import pytest

from launcher.utils import system


def first_port_of_connections() -> int:
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


def test_a_free_port_is_none_that_connections_get() -> None:
    ports = {system.free_port() for _ in range(50)}
    assert max(ports) < first_port_of_connections()
    assert min(ports) >= 10_000
    assert len(ports) > 40, "others that ask at the same time get the same ones"


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        number = taken.getsockname()[1]
        offered = iter([number, number, number + 1])
        monkeypatch.setattr(system.secrets, "randbelow", lambda _: next(offered) - 10_000)
        assert system.free_port() != number


def test_without_one_of_those_any_free_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        number = taken.getsockname()[1]
        monkeypatch.setattr(system.secrets, "randbelow", lambda _: number - 10_000)
        assert system.free_port() not in (number, 0)
