"""File channel: both sides of the folder, with real rank monitors and ranks."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.protocol.messages import AgentMessage, CommandExited, RankExited, RankHeartbeat, UserNote
from launcher.protocol.rundir import RunDir
from launcher.supervision.external_launcher import FileChannelRanks
from launcher.supervision.file_channel import (
    AgentFile,
    Lease,
    MonitorFile,
    agent_file,
    channel_folder,
    mark_run_over,
    rank_file,
    read_channel_file,
    write_channel_file,
)
from tests.helpers import wait_for

RANK = """
import faulthandler, os, signal, sys, time
from pathlib import Path
from launcher.supervision.file_channel import FileChannel
from launcher.supervision.rank_monitor import fork_monitor
from launcher.protocol.heartbeat import Heartbeat
channel = FileChannel(Path(sys.argv[1]), rank=int(sys.argv[2]), token=sys.argv[3], timeout_s=3.0)
faulthandler.register(signal.SIGUSR2)  # as in every rank: the agent asks the others for stacks when one has failed
fork_monitor(int(sys.argv[2]), channel)
Heartbeat(channel.heartbeat).update("forward", step=7, loss=1.5)
time.sleep(float(sys.argv[4]))
sys.exit(int(sys.argv[5]))
"""


class Side:
    """The agent's side of a run of two ranks on two hosts, with a launcher that is a plain ``Popen``."""

    def __init__(self, plan: Any, folder: Path) -> None:
        self.run_dir = RunDir(folder)
        self.run_dir.logs.mkdir(parents=True)
        channel_folder(self.run_dir).mkdir()
        scratch = folder / "scratch"
        scratch.mkdir()
        self.sent: list[AgentMessage] = []
        mine = replace(plan.hosts[0], host=replace(plan.hosts[0].host, name="here", slots=2))
        self.ranks = FileChannelRanks(
            mine, plan=plan, run_dir=self.run_dir, scratch=scratch, emit=self.sent.append, token="now"
        )
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, rank: int, *, token: str = "now", for_s: float = 60.0, code: int = 0) -> subprocess.Popen[bytes]:
        folder = str(channel_folder(self.run_dir))
        command = [sys.executable, "-c", RANK, folder, str(rank), token, str(for_s), str(code)]
        self.started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        return self.started[-1]

    def until(self, condition: Callable[[], object], seconds: float = 30) -> None:
        def is_met() -> object:
            self.ranks.poll(logs=True)
            return condition()

        wait_for(is_met, seconds=seconds, shown=lambda: self.sent)

    def of(self, kind: type[AgentMessage]) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


@pytest.fixture
def side(plan_of: Any, tmp_path: Path) -> Iterator[Side]:
    from launcher.protocol.plan import Host

    hosts = [Host(name=name, slots=1, ssh_destination=name, address=name, cores=2) for name in ("node1", "node2")]
    plan = replace(plan_of("model=gpt2_tiny", "data=synthetic", hosts=hosts), heartbeat_timeout_s=3.0)
    made = Side(plan, tmp_path)
    yield made
    made.ranks.drain()
    for process in made.started:
        process.kill()
        process.wait()


def test_heartbeats_and_exits_of_every_host_arrive(side: Side) -> None:
    side.start(0, for_s=1.5, code=3)
    side.start(1, for_s=1.5)
    side.until(lambda: len(side.of(RankExited)) == 2)
    assert {(end.rank, end.code) for end in side.of(RankExited)} == {(0, 3), (1, 0)}
    assert {
        (heartbeat.rank, heartbeat.phase, heartbeat.step, heartbeat.numbers["loss"])
        for heartbeat in side.of(RankHeartbeat)
    } == {
        (0, "forward", 7, 1.5),
        (1, "forward", 7, 1.5),
    }
    assert not side.ranks.any_alive()


def test_signals_reach_the_ranks_through_their_monitors(side: Side) -> None:
    monitor = side.start(0)
    side.until(side.ranks.any_alive)
    assert side.ranks.send(signal.SIGTERM) == 1
    side.until(lambda: side.of(RankExited))
    assert side.of(RankExited)[0].signal == signal.SIGTERM
    assert monitor.wait(10) == -signal.SIGTERM


def test_host_of_a_silent_monitor_is_lost(side: Side) -> None:
    monitor = side.start(1)
    side.until(side.ranks.any_alive)
    monitor.kill()
    side.until(lambda: side.of(CommandExited))
    assert side.of(CommandExited)[0].reason.startswith("no heartbeat from node2 for ")
    assert not side.ranks.any_alive()


def test_rank_ends_when_its_agent_is_silent(side: Side) -> None:
    monitor = side.start(0)
    side.until(side.ranks.any_alive)
    assert monitor.wait(30) == -signal.SIGTERM  # the agent is not polled any more


def test_rank_ends_when_the_run_is_over_or_another_start(side: Side) -> None:
    monitor = side.start(0)
    side.until(side.ranks.any_alive)
    mark_run_over(side.run_dir)
    assert monitor.wait(10) == -signal.SIGTERM
    assert side.start(1, token="earlier").wait(20) == -signal.SIGTERM


def test_files_of_an_earlier_start_are_ignored(side: Side) -> None:
    stale = {
        "token": "earlier",
        "sequence": 9,
        "monitor_pid": 1,
        "pid": 2,
        "heartbeat": None,
        "age_s": 0.0,
        "status": 0,
        "time": 1.0,
    }
    write_channel_file(rank_file(channel_folder(side.run_dir), 0), stale)
    deadline = time.monotonic() + 1.0
    side.until(lambda: time.monotonic() > deadline)
    assert side.sent == []


MONITOR_FILE = {"token": "now", "sequence": 1, "heartbeat": None, "age_s": 0.0, "monitor_pid": 1, "pid": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        {"monitor_pid": "1"},
        {"heartbeat": {"phase": 1}},
        {"heartbeat": {"phase": "forward", "step": 1, "at": 1.0, "numbers": {"loss": "x"}}},
        {"status": 0x137F, "time": 1.0, "by_launcher": False},
        {"status": 2**80, "time": 1.0, "by_launcher": False},
        {"status": 0, "time": None, "by_launcher": False},
        {"status": 0},
    ],
)
def test_malformed_file_is_reported_once(side: Side, wrong: dict[str, Any]) -> None:
    write_channel_file(rank_file(channel_folder(side.run_dir), 0), MONITOR_FILE | wrong)
    for _ in range(3):
        side.ranks._read(0)
    assert [note.text.partition(" wrote ")[0] for note in side.of(UserNote)] == ["the rank monitor of rank 0"]
    assert not side.ranks.any_alive()


@pytest.mark.parametrize(
    "sent",
    [
        b"{",
        b"[" * 4000,
        b"\xff\xfe",
        b"[]",
        b'{"kind": []}',
        b'{"kind": "started", "rank": 99, "monitor_pid": 1, "pid": 1}',
        b'{"kind": "started", "rank": "0", "monitor_pid": 1, "pid": 1}',
        b'{"kind": "signalled", "signal": 1, "signalled_at": NaN}',
        b'{"kind": "exited", "status": 0, "time": 1.0, "wall_s": 1.0, "by_launcher": false}',
    ],
)
def test_monitor_that_sends_a_malformed_message_is_closed_alone(side: Side, sent: bytes) -> None:
    monitor, agent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with monitor, agent:
        agent.setblocking(False)
        monitor.send(sent)
        assert not side.ranks.receive(agent)
    assert [note.text.partition(":")[0] for note in side.of(UserNote)] == [
        "the connection to the rank monitor was closed"
    ]


def test_rank_whose_launcher_is_killed_ends_and_reports_it(side: Side) -> None:
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {RANK!r}, *sys.argv[1:]]).wait()"
    command = [sys.executable, "-c", code, str(channel_folder(side.run_dir)), "1", "now", "60", "0"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as launcher:
        side.until(side.ranks.any_alive)
        launcher.kill()
        side.until(lambda: side.of(RankExited))
    assert side.of(CommandExited)[0].reason == "the launcher of the ranks on node2 was killed, so they were ended"


def test_lease_uses_the_local_clock_only() -> None:
    lease = Lease(0.2)
    lease.renew(5)
    assert not lease.is_expired
    time.sleep(0.3)
    lease.renew(5)
    assert lease.is_expired
    lease.renew(6)
    assert not lease.is_expired


def test_incomplete_file_is_ignored(tmp_path: Path) -> None:
    path = agent_file(tmp_path)
    assert read_channel_file(path, AgentFile) is None
    written = AgentFile(token="now", sequence=1, signals=[15], is_over=False)
    write_channel_file(path, written)
    assert read_channel_file(path, AgentFile) == written
    assert read_channel_file(path, MonitorFile) is None
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    content = path.read_text()
    path.write_text(content[:-1])
    assert read_channel_file(path, AgentFile) is None
    sequences = [content.replace('"sequence": 1', f'"sequence": {value}') for value in ("1e999", "true", "1.5", 2**64)]
    for damaged in ("[" * 100_000, "[1]", *sequences, "\udcff"):
        path.write_text(damaged, errors="surrogateescape")
        assert read_channel_file(path, AgentFile) is None, damaged[:20]
