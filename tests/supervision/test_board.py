"""The board: two sides of a folder, with real guards of real processes between them."""

from __future__ import annotations

import json
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
    Lease,
    agent_file,
    channel_folder,
    mark_run_over,
    rank_file,
    read_channel_file,
    write_channel_file,
)

GUARD = """
import os, sys, time
from pathlib import Path
from launcher.supervision.file_channel import FileChannel as BoardLink
from launcher.supervision.rank_monitor import fork_monitor as guard_rank
from launcher.protocol.heartbeat import Heartbeat
link = BoardLink(Path(sys.argv[1]), rank=int(sys.argv[2]), token=sys.argv[3], timeout_s=3.0)
guard_rank(int(sys.argv[2]), link)
Heartbeat(link.beats).update("forward", step=7, loss=1.5)
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
        self.told: list[AgentMessage] = []
        mine = replace(plan.hosts[0], host=replace(plan.hosts[0].host, name="here", slots=2))
        self.ranks = FileChannelRanks(
            mine, plan=plan, run_dir=self.run_dir, scratch=scratch, emit=self.told.append, token="now"
        )
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, rank: int, *, token: str = "now", for_s: float = 60.0, code: int = 0) -> subprocess.Popen[bytes]:
        board = str(channel_folder(self.run_dir))
        command = [sys.executable, "-c", GUARD, board, str(rank), token, str(for_s), str(code)]
        self.started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        return self.started[-1]

    def until(self, condition: Callable[[], object], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            self.ranks.poll(logs=True)
            assert time.monotonic() < deadline, self.told
            time.sleep(0.05)

    def of(self, kind: type[AgentMessage]) -> list[Any]:
        return [message for message in self.told if isinstance(message, kind)]


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


def test_beats_and_exits_of_every_host_arrive(side: Side) -> None:
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


def test_signals_reach_the_ranks_through_their_guards(side: Side) -> None:
    guard = side.start(0)
    side.until(side.ranks.any_alive)
    assert side.ranks.send(signal.SIGTERM) == 1
    side.until(lambda: side.of(RankExited))
    assert side.of(RankExited)[0].signal == signal.SIGTERM
    assert guard.wait(10) == -signal.SIGTERM


def test_a_guard_that_falls_silent_takes_its_host_with_it(side: Side) -> None:
    guard = side.start(1)
    side.until(side.ranks.any_alive)
    guard.kill()
    side.until(lambda: side.of(CommandExited))
    assert side.of(CommandExited)[0].why.startswith("nothing was heard of node2 for ")
    assert not side.ranks.any_alive()


def test_a_rank_ends_when_its_agent_falls_silent(side: Side) -> None:
    guard = side.start(0)
    side.until(side.ranks.any_alive)
    assert guard.wait(30) == -signal.SIGTERM  # nobody polls any more


def test_a_rank_ends_when_the_run_is_called_off_or_belongs_to_another_start(side: Side) -> None:
    guard = side.start(0)
    side.until(side.ranks.any_alive)
    mark_run_over(side.run_dir)
    assert guard.wait(10) == -signal.SIGTERM
    assert side.start(1, token="earlier").wait(20) == -signal.SIGTERM


def test_what_an_earlier_start_left_is_not_taken_for_this_one(side: Side) -> None:
    stale = {
        "token": "earlier",
        "turn": 9,
        "guard": 1,
        "pid": 2,
        "heartbeat": None,
        "age_s": 0.0,
        "status": 0,
        "time": 1.0,
    }
    write_channel_file(rank_file(channel_folder(side.run_dir), 0), stale)
    deadline = time.monotonic() + 1.0
    side.until(lambda: time.monotonic() > deadline)
    assert side.told == []


GUARD_POST = {"token": "now", "turn": 1, "heartbeat": None, "age_s": 0.0, "guard": 1, "pid": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        {"guard": "1"},
        {"heartbeat": {"phase": 1}},
        {"heartbeat": {"phase": "forward", "step": 1, "at": 1.0, "numbers": {"loss": "x"}}},
        {"status": 0x137F, "time": 1.0, "by_launcher": False},
        {"status": 2**80, "time": 1.0, "by_launcher": False},
        {"status": 0, "time": None, "by_launcher": False},
        {"status": 0},
    ],
)
def test_a_file_that_no_guard_writes_is_named_once(side: Side, wrong: dict[str, Any]) -> None:
    write_channel_file(rank_file(channel_folder(side.run_dir), 0), GUARD_POST | wrong)
    for _ in range(3):
        side.ranks._look_at(0)
    assert [note.text.partition(" posted ")[0] for note in side.of(UserNote)] == ["the guard of rank 0"]
    assert not side.ranks.any_alive()


@pytest.mark.parametrize(
    "sent",
    [
        b"{",
        b"[" * 4000,
        b"\xff\xfe",
        b"[]",
        b'{"kind": []}',
        b'{"kind": "hello", "rank": 99, "guard": 1, "pid": 1}',
        b'{"kind": "hello", "rank": "0", "guard": 1, "pid": 1}',
        b'{"kind": "told", "signal": 1, "told_at": NaN}',
        b'{"kind": "exit", "status": 0, "time": 1.0, "wall_s": 1.0, "by_launcher": false}',
    ],
)
def test_a_guard_that_sends_no_message_is_closed_alone(side: Side, sent: bytes) -> None:
    guard, agent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with guard, agent:
        agent.setblocking(False)
        guard.send(sent)
        assert not side.ranks.hear(agent)
    assert [note.text.partition(":")[0] for note in side.of(UserNote)] == ["the connection to the guard was closed"]


def test_a_rank_whose_launcher_is_killed_ends_and_says_so(side: Side) -> None:
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {GUARD!r}, *sys.argv[1:]]).wait()"
    command = [sys.executable, "-c", code, str(channel_folder(side.run_dir)), "1", "now", "60", "0"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as launcher:
        side.until(side.ranks.any_alive)
        launcher.kill()
        side.until(lambda: side.of(RankExited))
    assert side.of(CommandExited)[0].why == "what started the ranks on node2 was killed; they were ended, too"


def test_a_lease_depends_on_no_clock_but_its_own() -> None:
    lease = Lease(0.2)
    lease.renew(5)
    assert not lease.is_over
    time.sleep(0.3)
    lease.renew(5)
    assert lease.is_over
    lease.renew(6)
    assert not lease.is_over


def test_half_a_file_is_no_file(tmp_path: Path) -> None:
    path = agent_file(tmp_path)
    assert read_channel_file(path, {"turn": int}) is None
    write_channel_file(path, {"turn": 1})
    assert read_channel_file(path, {"turn": int}) == {"turn": 1}
    assert read_channel_file(path, {"turn": str}) is None
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    path.write_text(json.dumps({"turn": 2})[:-1])
    assert read_channel_file(path, {"turn": int}) is None
    for damaged in ("[" * 100_000, "[1]", '{"turn": 1e999}', '{"turn": true}', "\udcff"):
        path.write_text(damaged, errors="surrogateescape")
        assert read_channel_file(path, {"turn": int}) is None, damaged[:20]
