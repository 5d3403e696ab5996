"""The newest state of a rank, in shared memory."""

import struct
import subprocess
import sys
import zlib

import pytest

from launcher.protocol.heartbeat import Heartbeat, create_heartbeat_file, map_heartbeat_file, read_heartbeat


@pytest.fixture
def path(tmp_path):
    create_heartbeat_file(tmp_path / "beats")
    return tmp_path / "beats"


def test_nothing_before_the_first(path):
    assert read_heartbeat(map_heartbeat_file(path)) is None


def test_step_and_numbers_are_kept(path):
    memory, heartbeat = map_heartbeat_file(path), Heartbeat(path)
    heartbeat.update("forward", 3, loss=2.5)
    heartbeat.update("backward", tokens_per_s=10)
    state = read_heartbeat(memory)
    assert (state.phase, state.step, state.numbers) == ("backward", 3, {"loss": 2.5, "tokens_per_s": 10})


def test_a_number_that_is_not_finite_is_left_out(path):
    heartbeat = Heartbeat(path)
    heartbeat.update("forward", 1, loss=1.0)
    heartbeat.update("forward", 2, loss=float("nan"))
    assert read_heartbeat(map_heartbeat_file(path)).numbers == {}


def test_a_state_caught_half_written_is_not_believed(path):
    Heartbeat(path).update("forward", 1)
    memory = map_heartbeat_file(path)
    memory[12] = memory[12] ^ 1
    assert read_heartbeat(memory) is None


@pytest.mark.parametrize(
    "payload",
    [b"[" * 2000, b"null", b"{}", b'{"phase": 1, "step": null, "at": 0.0, "numbers": {}}', b"\xff", b"1e999"],
    ids=["deep", "null", "empty", "wrong type", "not UTF-8", "a number"],
)
def test_a_state_that_is_none_is_not_believed(path, payload):
    memory = map_heartbeat_file(path)
    memory[: 8 + len(payload)] = struct.pack("<II", zlib.crc32(payload), len(payload)) + payload
    assert read_heartbeat(memory) is None


def test_no_listener(path):
    Heartbeat(None).update("forward", 1)
    heartbeat = Heartbeat(path)
    path.unlink()
    heartbeat.update("forward", 1)
    Heartbeat(path).update("forward", 1)


def test_it_crosses_processes(path):
    code = "import pathlib, sys; from launcher.protocol.heartbeat import Heartbeat as H; "
    code += "H(pathlib.Path(sys.argv[1])).update('data', 5)"
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)
    assert read_heartbeat(map_heartbeat_file(path)).step == 5
