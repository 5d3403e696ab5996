"""File sync from a host without a shared disk: two folders and a real pipe between them."""

import base64
import os
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest

from launcher.protocol.messages import FileChunk, UserNote
from launcher.protocol.plan import Command, Host, HostPlan
from launcher.protocol.rundir import RunDir
from launcher.protocol.wire import MessageReader
from launcher.supervision import file_sync
from launcher.supervision.connection import SessionConnection
from launcher.supervision.file_sync import FileSyncReceiver, FileSyncSender, is_synced
from launcher.utils.files import write_atomic

FIRST = HostPlan(host=Host(name="node1", slots=2), first_rank=0, agent_command=Command(argv=("true",)))
SECOND = HostPlan(host=Host(name="node2", slots=2), first_rank=2, agent_command=Command(argv=("true",)))


class Pair:
    """The run directory on a host, the one of the session, and the pipe between them."""

    def __init__(self, folder: Path, *, plan: HostPlan = FIRST) -> None:
        self.there, self.here, self.plan = folder / "there", folder / "here", plan
        (self.there / "logs").mkdir(parents=True)
        (self.here / "logs").mkdir(parents=True)
        self.notes: list[str] = []
        self.receiver = FileSyncReceiver(SimpleNamespace(run_dir=str(self.here), hosts=(FIRST, SECOND)))
        self.num_bytes = 0
        self.connect()

    def connect(self) -> None:
        """Begin another life of the run."""
        self.read_fd, write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        orders, self.orders = os.pipe()
        self.session, self.reader = SessionConnection(read_fd=orders, write_fd=write_fd), MessageReader()
        self.sender = FileSyncSender(RunDir(self.there), self.plan, session=self.session)

    def settle(self) -> None:
        """Move everything."""
        self.sender.scan()
        while self.sender.send_some() or self.session.num_queued_bytes:
            self.session.flush()
            self.read()
        self.read()

    def read(self) -> None:
        """Take what the pipe holds."""
        try:
            data = os.read(self.read_fd, 1 << 16)
        except BlockingIOError:
            return
        for message in self.reader.feed(data)[0]:
            if isinstance(message, UserNote):
                self.notes.append(message.text)
            else:
                self.num_bytes += len(message.data)
                assert self.receiver.write(self.plan.host.name, message) == ""

    def same(self, name: str) -> bool:
        return (self.here / name).read_bytes() == (self.there / name).read_bytes()


@pytest.fixture
def pair(tmp_path):
    return Pair(tmp_path)


def test_a_log_is_appended(pair):
    log = pair.there / "logs" / "node1.0.log"
    log.write_bytes(b"")
    pair.settle()
    assert pair.same("logs/node1.0.log")
    for piece in (b"a\n", os.urandom(3_000_000), b"half a line"):
        with log.open("ab") as file:
            file.write(piece)
        pair.settle()
        assert pair.same("logs/node1.0.log")
    assert pair.num_bytes < 1.5 * log.stat().st_size  # each byte once, in base64


def test_sender_does_not_wait_for_a_session_that_does_not_read(pair):
    (pair.there / "logs" / "node1.1.log").write_bytes(os.urandom(5_000_000))
    pair.sender.scan()
    for _ in range(100):
        assert pair.sender.send_some()
    assert pair.session.num_queued_bytes < 2_000_000
    pair.settle()
    assert pair.same("logs/node1.1.log")


def test_rewritten_files_are_replaced_atomically(pair):
    picture = pair.there / "loss.png"
    for content in (os.urandom(500_000), os.urandom(500_000), b"", b"short"):
        write_atomic(picture, content)
        pair.sender.scan()
        while pair.sender.send_some() or pair.session.num_queued_bytes:
            pair.session.flush()
            before = (pair.here / "loss.png").read_bytes() if (pair.here / "loss.png").exists() else None
            pair.read()
            after = (pair.here / "loss.png").read_bytes() if (pair.here / "loss.png").exists() else None
            assert after in (before, content)
        pair.read()
        assert pair.same("loss.png")
    assert [path.name for path in pair.here.iterdir() if path.is_file()] == ["loss.png"]


@pytest.mark.parametrize("is_another_agent", [True, False])
def test_metrics_that_a_resumed_run_truncates(pair, is_another_agent):
    metrics = pair.there / "metrics.jsonl"
    metrics.write_bytes(b"1\n2\n3\n4\n")
    pair.settle()
    if is_another_agent:
        pair.connect()
    write_atomic(metrics, b"1\n2\n")
    pair.settle()
    assert pair.same("metrics.jsonl")
    with metrics.open("ab") as file:
        file.write(b"3 again\n")
    pair.settle()
    assert pair.same("metrics.jsonl")


def test_a_file_sent_again_is_not_rewritten(pair):
    (pair.there / "metrics.jsonl").write_bytes(b"1\n2\n")
    pair.settle()
    before = (pair.here / "metrics.jsonl").stat()
    pair.connect()
    pair.settle()
    after = (pair.here / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_the_log_of_an_agent_is_appended_to_that_of_ssh(pair):
    ours, remote = (folder / "logs" / "node1.agent.log" for folder in (pair.here, pair.there))
    remote.write_text("of an earlier life\n")
    ours.write_text("ssh: something\n")
    pair.connect()
    with remote.open("a") as file:
        file.write("torchrun: something\n")
    pair.settle()
    with ours.open("a") as file:
        file.write("ssh: more\n")
    with remote.open("a") as file:
        file.write("torchrun: more\n")
    pair.settle()
    assert ours.read_text() == "ssh: something\ntorchrun: something\nssh: more\ntorchrun: more\n"


def test_a_file_that_is_too_large_is_named(pair, monkeypatch):
    monkeypatch.setattr(file_sync, "MAX_FILE_BYTES", 1 << 20)
    (pair.there / "picture.png").write_bytes(bytes(2 << 20))
    (pair.there / "logs" / "node1.0.log").write_bytes(bytes(2 << 20))
    pair.settle()
    pair.settle()
    (note,) = pair.notes
    assert "picture.png stays there: 2 MiB" in note
    assert not (pair.here / "picture.png").exists()
    assert pair.same("logs/node1.0.log")


def test_nothing_is_sent_to_a_lost_session(pair):
    (pair.there / "logs" / "node1.0.log").write_bytes(bytes(1 << 20))
    pair.session.mark_lost()
    pair.sender.scan()
    pair.sender.send_some()
    assert pair.session.num_queued_bytes == 0
    assert pair.sender.unsent() == ["logs/node1.0.log"]  # and it is not read


@pytest.mark.parametrize(
    ("name", "plan", "is_sent"),
    [
        ("metrics.jsonl", FIRST, True),
        ("metrics.jsonl", SECOND, False),
        ("wandb/offline-run-1/run-1.wandb", FIRST, True),
        ("logs/node1.0.log", FIRST, True),
        ("logs/node1.0.log", SECOND, False),
        ("logs/node2.agent.log", SECOND, True),
        ("logs/failure.rank3.json", SECOND, True),
        ("logs/failure.rank3.json", FIRST, False),
        ("checkpoints/step_00000002/manifest.json", FIRST, False),
        ("run.yaml", FIRST, False),
        ("plan.json", FIRST, False),
        ("session.json", FIRST, False),
        ("result.json", FIRST, False),
        ("timeline.jsonl", FIRST, False),
        (".metrics.jsonl.12.tmp", FIRST, False),
        ("../metrics.jsonl", FIRST, False),
        ("logs/node1.x/../../../metrics.jsonl", FIRST, False),
        ("/etc/passwd", FIRST, False),
    ],
)
def test_is_synced(name, plan, is_sent, tmp_path):
    assert is_synced(PurePosixPath(name), plan) == is_sent
    receiver = FileSyncReceiver(SimpleNamespace(run_dir=str(tmp_path), hosts=(FIRST, SECOND)))
    data = base64.b64encode(b"x").decode()
    trouble = receiver.write(plan.host.name, FileChunk(path=name, offset=0, data=data, size=1, grows=True))
    assert (trouble == "") == is_sent
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b"x"] * is_sent


@pytest.mark.parametrize("grows", [True, False])
def test_no_link_leads_a_host_out_of_the_run_directory(tmp_path, grows):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret.log").write_text("secret")
    (inside / "folder").symlink_to(outside)
    (inside / "file.log").symlink_to(outside / "secret.log")
    receiver = FileSyncReceiver(SimpleNamespace(run_dir=str(inside), hosts=(FIRST,)))
    for name in ("folder/new.log", "folder/secret.log", "file.log"):
        receiver.write("node1", FileChunk(path=name, offset=0, data="eHh4", size=3, grows=grows))
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"secret.log": "secret"}
