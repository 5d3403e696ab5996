"""session.json: state of a process on this machine and on others."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import (
    AgentLocation,
    ProcessLocation,
    SessionRecord,
    locate_this_process,
    read_session_file,
    write_session_file,
)
from launcher.utils.processes import identify


@pytest.fixture
def here() -> ProcessLocation:
    return locate_this_process()


@pytest.fixture
def child(here: ProcessLocation) -> Iterator[tuple[subprocess.Popen[bytes], ProcessLocation]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        known = identify(process.pid)
        assert known is not None
        yield process, replace(here, pid=known.pid, started=known.started)
        process.kill()


def test_round_trip(tmp_path: Path, here: ProcessLocation) -> None:
    agents = (
        AgentLocation(host="a", location=here),
        AgentLocation(host="b", ssh_destination="me@b:2222", location=replace(here, pid=7)),
    )
    written = SessionRecord(backend="ssh", session=here, agents=agents, job={"id": "12"})
    write_session_file(RunDir(tmp_path), written)
    assert read_session_file(RunDir(tmp_path)) == written
    assert [path.name for path in tmp_path.iterdir()] == ["session.json"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "7", "{}", '{"backend": "ssh", "session": {"pid": "x"}}'])
def test_invalid_file_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        RunDir(tmp_path).session.write_text(text)
    assert read_session_file(RunDir(tmp_path)) is None


def test_a_process_runs_until_it_ends(child: tuple[subprocess.Popen[bytes], ProcessLocation]) -> None:
    process, place = child
    assert place.is_running() is True
    assert replace(place, started=place.started + 1).is_running() is False
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert place.is_running() is False, "a zombie has ended"
    process.wait()
    assert place.is_running() is False


def test_pid_of_another_machine_is_unknown(here: ProcessLocation) -> None:
    assert here.is_running() is True
    assert replace(here, pid_namespace=here.pid_namespace + 1).is_running() is None, "a container beside this one"
    assert replace(here, boot="another", machine="far").is_running() is None
    assert replace(here, boot="another").is_running() is False, "this machine has been started since"


def test_a_run_is_running_while_session_or_agent_is(here: ProcessLocation) -> None:
    gone, far = replace(here, started=here.started + 1), replace(here, boot="another", machine="far")

    def answer(session: ProcessLocation, *agents: ProcessLocation, job: dict[str, str] | None = None) -> bool | None:
        places = tuple(AgentLocation(host=str(number), location=place) for number, place in enumerate(agents))
        return SessionRecord(backend="ssh", session=session, agents=places, job=job or {}).is_running()

    assert answer(here) is True
    assert answer(gone, gone, here) is True
    assert answer(far, gone) is None
    assert answer(gone, far) is False
    assert answer(gone, gone) is False
    assert answer(gone, job={"id": "12"}) is None
