"""``launch cancel``: it ends this run, says so once it is true, and touches nothing else."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import ConfigError, EnvironmentProblem
from launcher.protocol.session_file import AgentLocation, ProcessLocation
from launcher.utils.files import read_json, write_json
from launcher.utils.processes import Process, identify
from tests.cli.conftest import SMALL
from tests.helpers import launch_verb

run = launch_verb("cancel")

LONG = (*SMALL, "job.steps=100000", "job.eval_every=0")
TRAP = """
import pathlib, signal, sys
seen = []
def note(number, _):
    seen.append(number)
    pathlib.Path("seen").write_text(" ".join(map(str, seen)))
    if len(seen) == 2:
        sys.exit()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
print("ready", flush=True)
while True:
    signal.pause()
"""

Start = Callable[..., tuple[subprocess.Popen[bytes], ProcessLocation]]


@pytest.fixture
def start(alive: ProcessLocation, tmp_path: Path) -> Iterator[Start]:
    """Start processes that are waited for at once, as a shell or an init would, and tell their place."""
    started: list[tuple[subprocess.Popen[bytes], threading.Thread]] = []

    def begin(*command: str) -> tuple[subprocess.Popen[bytes], ProcessLocation]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path)
        known = identify(process.pid)
        assert known is not None
        waiting = threading.Thread(target=process.wait)
        waiting.start()
        started.append((process, waiting))
        return process, replace(alive, pid=known.pid, started=known.started)

    yield begin
    for process, waiting in started:
        process.kill()
        waiting.join()
        assert process.stdout is not None
        process.stdout.close()


def test_a_real_run_is_followed_cancelled_and_gone(launch, launch_forked_in_background, tmp_path) -> None:
    """From other shells: ``logs -f`` ends with the run's own exit code, and a run beside it continues."""
    running, beside = launch_forked_in_background(*LONG), launch_forked_in_background(*LONG, "run.dir=beside")
    running.wait_for_output(":0 | step 2/")
    run_id = Path(re.findall(r"run directory: (\S+)", running.output)[0]).name
    assert "running" in launch("status", run_id).expect(0).stdout
    following = launch_forked_in_background("logs", run_id, "-f", "--rank", "0", "-n", "1")
    following.wait_for_output(":0 | step ")
    said = launch("cancel", run_id).expect(0).stdout
    assert "no process of it is left on this machine" in said
    code = running.wait()
    assert code in (75, 128 + signal.SIGTERM)
    assert following.wait() == code
    assert "has already ended" in launch("cancel", run_id).expect(0).stdout
    beside.wait_for_output(":0 | step ")
    assert "no process of it is left" in launch("cancel", "beside", "--now").expect(0).stdout
    assert beside.wait() == 128 + signal.SIGINT
    assert read_json(tmp_path / "beside" / "result.json")["status"] == "cancelled"


def test_the_session_is_asked_and_its_agents_are_waited_for(capsys, make_run, start) -> None:
    session, place = start("sleep", "600")
    agent, agent_place = start("sleep", "2")
    make_run(session=place, agents=(AgentLocation(host="box", location=agent_place),))
    assert run([]) == 0
    assert (session.wait(30), agent.wait(30)) == (-signal.SIGTERM, 0)
    said = capsys.readouterr().out
    assert f"asking process {session.pid} to end" in said
    assert "it is lost" in said


def test_now_is_two_interrupts(make_run, start, tmp_path) -> None:
    session, place = start(sys.executable, "-c", TRAP)
    assert session.stdout is not None
    assert session.stdout.readline() == b"ready\n"
    make_run(session=place)
    assert run(["--now"]) == 0
    assert (tmp_path / "seen").read_text() == f"{int(signal.SIGINT)} {int(signal.SIGINT)}"


def test_without_its_session_the_agents_get_the_order(capsys, make_run, start, gone, far) -> None:
    agent, place = start("sleep", "600")
    agents = (
        AgentLocation(host="box", location=place),
        AgentLocation(host="b", ssh_destination="me@b:22", location=far),
    )
    run_dir = make_run(session=gone, agents=agents)
    assert run([]) == 0
    assert agent.wait(30) == -signal.SIGTERM
    assert f"ssh ssh://me@b:22 'launch cancel {run_dir.path}'" in capsys.readouterr().out


def test_a_number_that_another_process_has_now_is_not_signalled(capsys, make_run, child, gone) -> None:
    process, place = child
    stranger = replace(place, started=place.started - 1)
    make_run(session=stranger, agents=(AgentLocation(host="box", location=stranger),))
    assert run([]) == 0
    assert "has already ended: lost" in capsys.readouterr().out
    assert process.poll() is None


@pytest.mark.parametrize("status", ["completed", "failed", "preempted", "cancelled"])
def test_what_is_over_stays_over(capsys, make_run, child, status: str) -> None:
    """Though a process of it still lives, which has a moment to go."""
    process, place = child
    make_run(status=status, session=place)
    assert run([]) == 0
    assert f"has already ended: {status}" in capsys.readouterr().out
    assert process.poll() is None


def test_agents_elsewhere_of_a_lost_run_are_named(capsys, make_run, gone, far) -> None:
    run_dir = make_run(session=gone, agents=(AgentLocation(host="b", ssh_destination="me@b:22", location=far),))
    assert run([]) == 0
    ended, left = capsys.readouterr().out.splitlines()
    assert ended.endswith("has already ended: lost")
    assert left == f"  if b still runs it: ssh ssh://me@b:22 'launch cancel {run_dir.path}'"


def test_a_process_that_does_not_end_is_named(make_run, alive, monkeypatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(Process, "send", lambda _, number: sent.append(number))
    monkeypatch.setattr("launcher.cli.cancel._PATIENCE_S", 0.0)
    run_dir = make_run(session=alive)
    write_json(run_dir.plan, {**read_json(run_dir.plan), "grace_s": 0.0})
    with pytest.raises(EnvironmentProblem, match=f"process {alive.pid} is still running: try launch cancel --now"):
        run([])
    assert sent == [signal.SIGTERM]


def test_a_run_on_another_machine_is_left_alone(make_run, far) -> None:
    run_dir = make_run("with space", session=far)
    with pytest.raises(EnvironmentProblem) as caught:
        run([])
    first, command = str(caught.value).splitlines()
    assert "process" in first
    assert "on node7: type" in first
    shown = subprocess.run(
        ["bash", "-c", f'ssh() {{ shift; eval "$@"; }}; launch() {{ printf "%s\\n" "$@"; }}; {command}'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines() == ["cancel", str(run_dir.path)]


@pytest.mark.parametrize(
    ("backend", "job", "argv"),
    [
        ("slurm", {"id": "7"}, ["scancel", "--", "7"]),
        (
            "kubernetes",
            {"kind": "trainjob", "name": "a", "namespace": "ml"},
            ["kubectl", "--namespace=ml", "delete", "--", "trainjob", "a"],
        ),
        (
            "kubernetes",
            {"kind": "job", "name": "a", "namespace": "ml", "context": "far"},
            ["kubectl", "--context=far", "--namespace=ml", "delete", "--", "job", "a"],
        ),
    ],
)
def test_a_job_is_cancelled_by_its_scheduler(
    capsys, make_run, gone, monkeypatch, tmp_path, backend: str, job: dict[str, str], argv: list[str]
) -> None:
    make_run(session=gone, backend=backend, job=job)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(EnvironmentProblem, match=f"{argv[0]} is not installed on this machine"):
        run([])
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / argv[0]
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/argv\nexit $(/bin/cat {tmp_path}/code)\n')
    program.chmod(0o755)
    (tmp_path / "code").write_text("0")
    assert run([]) == 0
    assert (tmp_path / "argv").read_text().splitlines() == argv[1:]
    (tmp_path / "code").write_text("3")
    with pytest.raises(EnvironmentProblem, match="ended with exit code 3"):
        run([])


def test_a_run_that_has_not_said_who_runs_it(make_run) -> None:
    make_run(age_s=1)
    with pytest.raises(EnvironmentProblem, match=r"has no session\.json yet"):
        run([])


def test_an_unknown_run_is_refused(make_run) -> None:
    make_run()
    with pytest.raises(ConfigError, match="is not a run directory"):
        run(["nope"])


def test_help(capsys) -> None:
    assert run(["--help"]) == 0
    assert "launch cancel --now" in capsys.readouterr().out
