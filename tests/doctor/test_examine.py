"""Examinations of processes of this machine that play hosts; tests/doctor/test_faults.py has real ones."""

from __future__ import annotations

import json
import os
import resource
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.doctor.report import DoctorReport

from .conftest import NAMED_PROBE, Examine

PROBE = (sys.executable, "-m", "launcher.doctor.probe")
SILENT = ("sleep", "1000")


def errors_of(report: DoctorReport) -> dict[str, str]:
    """Return what is wrong with each host."""
    return {found.host: found.what for found in report.errors}


def ask(probe: psutil.Popen, **question: Any) -> None:
    """Send a question to a probe."""
    probe.stdin.write(json.dumps(question) + "\n")
    probe.stdin.flush()


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path: Path) -> object:
    before = set(psutil.Process().children(recursive=True))  # of earlier tests in this process
    yield
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not list(tmp_path.rglob(".launcher-doctor-*"))
    assert not (tmp_path / "runs").exists()


def test_hosts_that_are_well(examine_here: Examine) -> None:
    report = examine_here(2)
    assert errors_of(report) == {}
    assert list(report.facts) == list(report.contacts) == ["node1", "node2"]
    assert all(facts.storage.is_shared for facts in report.facts.values())
    assert 0 < (report.contacts["node2"].latency_s or 0) < 1
    assert max(map(abs, report.skews_s.values())) < 2
    known = report.probed(report.hosts)
    assert all(host.is_probed and host.cores and host.memory_bytes and host.interface for host in known)
    assert known[0].address == report.facts["node1"].address
    assert report.port is not None
    with socket.create_server(("", report.port)):
        pass  # it is free again


def test_all_reduces_are_measured_between_all_pairs(examine_here: Examine) -> None:
    report = examine_here(3, quick=False)
    assert errors_of(report) == {}
    assert {pair.hosts for pair in report.pairs} == {("node1", "node2"), ("node1", "node3"), ("node2", "node3")}
    assert all(pair.latency_s and pair.bytes_per_s for pair in report.pairs)
    assert [found.problem for found in report.group.values()] == [None] * 3


def test_a_host_that_says_hello_gets_more_time_than_a_silent_one(examine_here: Examine) -> None:
    hello = """echo '{"doctor": "hello"}'"""
    slow = ("sh", "-c", f"{hello}; sleep 5; exec {shlex.join(NAMED_PROBE)} other")
    assert errors_of(examine_here(2, commands={"node2": slow}, deadline_s=8.0)) == {}
    stuck = ("sh", "-c", f"{hello}; cat >/dev/null")
    errors = errors_of(examine_here(2, commands={"node2": stuck}, deadline_s=3.0))
    assert errors == {"node2": "answers, but its probe sent no facts within 2.4 s"}


def test_hosts_that_are_unfit_already_are_not_measured(examine_here: Examine) -> None:
    report = examine_here(3, commands={"node2": ("false",)}, quick=False)
    assert list(errors_of(report)) == ["node2"]
    assert (report.pairs, report.group) == ((), {})


def test_one_machine_under_two_names(examine_here: Examine) -> None:
    report = examine_here(2, commands={"node2": (*NAMED_PROBE, "node1")})
    assert errors_of(report) == {"node2": "is the same machine as node1"}


def test_a_silent_host_costs_no_more_than_the_deadline_and_hides_nothing_else(examine_here: Examine) -> None:
    report = examine_here(3, commands={"node2": SILENT}, deadline_s=5.0)
    assert errors_of(report) == {"node2": "does not answer within 3.0 s"}
    assert list(report.facts) == ["node1", "node3"]


def test_a_dead_first_host_does_not_keep_the_others_from_being_examined(examine_here: Examine) -> None:
    report = examine_here(3, commands={"node1": ("false",)})
    assert list(errors_of(report)) == ["node1"]
    assert report.contacts["node3"].latency_s is not None


def test_a_login_shell_may_greet_and_chatter(examine_here: Examine) -> None:
    chatty = ("sh", "-c", f"echo Welcome; echo '{{'; echo Warning >&2; exec {shlex.join(NAMED_PROBE)} other")
    assert errors_of(examine_here(2, commands={"node2": chatty})) == {}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("/nowhere/ssh", "node2"), "nothing can be started for it: /nowhere/ssh: No such file or directory"),
        (("sh", "-c", "echo 'me@node2: Permission denied (publickey).' >&2; exit 255"), "rejects the ssh key"),
        (("sh", "-c", "exec /nowhere/python -m launcher.doctor.probe"), "has no"),
        ((sys.executable, "-S", "-m", "launcher.doctor.probe"), "lacks the package psutil"),
        (("sh", "-c", """echo '{"doctor": "facts", "facts": {"hostname": "x"}}'; cat"""), "incompatible version"),
        (("sh", "-c", """echo '{"doctor": "facts", "clock": NaN, "facts": []}'; cat"""), "incompatible version"),
    ],
)
def test_a_host_that_cannot_be_examined_is_named_with_the_reason(
    examine_here: Examine, command: tuple[str, ...], words: str
) -> None:
    report = examine_here(2, commands={"node2": command})
    assert list(errors_of(report)) == ["node2"]
    assert words in errors_of(report)["node2"]


def test_another_version_of_a_package_is_found_where_the_interpreter_finds_it(
    examine_here: Examine, tmp_path: Path
) -> None:
    info = tmp_path / "older" / "transformers-5.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.1.0\n")
    report = examine_here(
        2, commands={"node2": ("env", f"PYTHONPATH={info.parent}:{Path.cwd()}", *NAMED_PROBE, "other")}
    )
    (what,) = errors_of(report).values()
    assert what.startswith("transformers is 5.1.0 and node1 has ")


def test_a_port_that_is_taken(examine_here: Examine) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        what = errors_of(examine_here(2, port=port))["node1"]
    assert f"port {port} cannot be opened for the rendezvous" in what
    assert f"process {os.getpid()}" in what


def test_what_was_started_ends_with_a_killed_probe(tmp_path: Path) -> None:
    """The kernel ends it, also when it is busy: here it looks for a rendezvous that no process opens."""
    order = {
        "rank": 1,
        "names": ["node1", "node2"],
        "address": "127.0.0.1",
        "port": 9,
        "interface": None,
        "uses_gpus": False,
        "timeout_s": 600,
    }
    probe = psutil.Popen(PROBE, stdin=-1, stdout=-1, text=True)
    ask(probe, ask="facts", run_dir=str(tmp_path), token=None, is_full=True, life_s=600)
    assert "hello" in probe.stdout.readline()
    assert "facts" in probe.stdout.readline()
    (collective,) = probe.children()
    ask(probe, ask="collective", order=order)
    ask(probe, ask="close_port")
    assert "close_port" in probe.stdout.readline()
    probe.kill()
    probe.wait()
    psutil.wait_procs([collective], timeout=30)
    assert not collective.is_running()
    probe.stdin.close()
    probe.stdout.close()


def test_a_probe_whose_doctor_never_says_goodbye_ends_by_itself(tmp_path: Path) -> None:
    probe = psutil.Popen(PROBE, stdin=-1, stdout=-1, text=True)
    probe.stdin.write(f'{{"ask": "facts", "run_dir": "{tmp_path}", "token": null, "is_full": false, "life_s": 0.5}}\n')
    probe.stdin.flush()
    assert probe.wait(timeout=30) < 0
    probe.stdin.close()
    probe.stdout.close()


def test_hundreds_of_hosts_are_asked_at_once_with_few_files_allowed(examine_here: Examine) -> None:
    """Each waits a second before it fails; one after the other that would be five minutes."""
    late = ("sh", "-c", "sleep 1; echo 'ssh: connect to host x port 22: Connection refused' >&2; exit 255")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        started = time.monotonic()
        report = examine_here(300, commands={f"node{number}": late for number in range(2, 301)})
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert time.monotonic() - started < 120
    assert len(report.findings) == 299
    assert {found.what for found in report.errors} == {"is up, but nothing listens on its ssh port"}
    assert list(report.facts) == ["node1"]
