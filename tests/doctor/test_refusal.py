"""Words of real ssh clients, shells and interpreters, and what they are taken for."""

from __future__ import annotations

import pytest

from launcher.doctor.probe_failure import explain_probe_failure
from launcher.doctor.protocol import parse_message
from launcher.protocol.plan import Host

HOST = Host(name="node3", slots=1, ssh_destination="me@node3:2222", python="/venv/bin/python")

CHANGED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
Host key verification failed.
"""


@pytest.mark.parametrize(
    ("stderr_tail", "exit_code", "what", "remedy"),
    [
        ("me@node3: Permission denied (publickey).", 255, "rejects the ssh key", "ssh-copy-id"),
        (CHANGED, 255, "its host key has changed", "ssh-keygen -R node3"),
        ("Host key verification failed.", 255, "its host key is unknown", "by hand"),
        ("ssh: Could not resolve hostname node3: Name or service not known", 255, "does not resolve", "HostName"),
        ("ssh: connect to host node3 port 2222: Connection refused", 255, "nothing listens", "start sshd"),
        ("ssh: connect to host node3 port 2222: No route to host", 255, "no route", "switched on"),
        ("ssh: connect to host node3 port 2222: Connection timed out", 255, "does not answer", "firewall"),
        ("kex_exchange_identification: Connection closed by remote host", 255, "drops it", "MaxStartups"),
        ("/root/.ssh/config: line 3: Bad configuration option: prot", 255, "rejects its configuration", "ssh -G"),
        ("sh: 1: exec: /venv/bin/python: not found", 127, "has no /venv/bin/python", "backend.python"),
        ("/venv/bin/python: Command not found.", 1, "has no /venv/bin/python", "backend.python"),
        ("sh: 1: exec: /venv/bin/python: Permission denied", 126, "cannot run /venv/bin/python", "architecture"),
        ("/venv/bin/python: No module named launcher.doctor.probe", 1, "another version of launcher", "backend.code"),
        (
            "/venv/bin/python: Error while finding module specification for 'launcher.doctor.probe' "
            "(ModuleNotFoundError: No module named 'launcher')",
            1,
            "has no launcher installed for /venv/bin/python",
            "scripts/install",
        ),
        ("ModuleNotFoundError: No module named 'psutil'", 1, "lacks the package psutil", "install it there"),
        (
            "launcher: cannot enter /home/me: No such file or directory; staying in /root\n"
            "launcher: the code arrived damaged: its SHA-256 is not 12ab",
            2,
            "the code arrived damaged: its SHA-256 is not 12ab",
            "correct that",
        ),
        ("srun: error: Unable to allocate: Invalid node", 1, "cannot be reached by srun: Unable to allocate", "salloc"),
        ("OSError: [Errno 28] No space left on device", 1, "has a full disk", "free space"),
        ("an unforeseen thing\nand its last line", 3, "exit code 3: and its last line", "ssh me@node3:2222"),
        ("", 3, "exit code 3: no output", "by hand"),
        ("", None, "does not answer within 8.0 s", "switched on"),
    ],
)
def test_a_host_that_gave_no_facts(stderr_tail: str, exit_code: int | None, what: str, remedy: str) -> None:
    found = explain_probe_failure(HOST, stderr_tail, exit_code=exit_code, has_started=False, waited_s=8.0)
    assert found.host == "node3"
    assert what in found.what
    assert remedy in found.remedy


def test_a_host_that_hangs_after_its_greeting() -> None:
    found = explain_probe_failure(HOST, "", exit_code=None, has_started=True, waited_s=8.0)
    assert "its probe sent no facts within 8.0 s" in found.what
    assert "nvidia-smi" in found.remedy


@pytest.mark.parametrize(
    "line",
    [
        b'{"doctor": ' + b"[" * 50_000,
        b'{"doctor": []}',
        b'{"doctor": "listen", "port": "1", "problem": null}',
        b'{"doctor": "collective", "exit_code": null}',
        b'{"doctor": "\xff"}',
    ],
)
def test_lines_of_no_probe_are_ignored(line: bytes) -> None:
    assert parse_message(line) is None
