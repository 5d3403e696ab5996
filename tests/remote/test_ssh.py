import sys

import pytest

from launcher.protocol.plan import Host
from launcher.remote.command import ONE_LINER, split_login, ssh_command


@pytest.mark.parametrize(
    ("login", "destination", "port"),
    [
        ("node1", "node1", None),
        ("ada@node1", "ada@node1", None),
        ("node1:2222", "node1", "2222"),
        ("ada@10.0.0.1:22", "ada@10.0.0.1", "22"),
        ("[fd00::1]", "fd00::1", None),
        ("ada@[fe80::1%eth0]:2222", "ada@fe80::1%eth0", "2222"),
    ],
)
def test_logins(login: str, destination: str, port: str | None) -> None:
    assert split_login(login) == (destination, port)


def test_the_command_is_whole() -> None:
    host = Host(name="node1", slots=1, ssh_destination="ada@node1:2222", python="/opt/venv/bin/python")
    remote = ssh_command(host, prologue=b"first", config="/my config", options=["-i", "/a key"])
    assert remote.prologue == b"first"
    assert remote.argv == (
        *("ssh", "-T", "-o", "BatchMode=yes", "-o", "ControlPath=none", "-o", "RemoteCommand=none"),
        *("-o", "ClearAllForwardings=yes", "-F", "/my config", "-i", "/a key", "-p", "2222", "--", "ada@node1"),
        f"exec /opt/venv/bin/python -I -c '{ONE_LINER}'",
    )


def test_the_command_grows_with_nothing_a_user_types() -> None:
    remote = ssh_command(Host(name="n", slots=1, ssh_destination="n", python=sys.executable), prologue=b"x" * 10_000)
    assert sum(map(len, remote.argv)) < 300 + len(sys.executable)
