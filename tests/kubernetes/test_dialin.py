"""Agents that dial in: who is let in, who is not, and what travels."""

import contextlib
import json
import socket
import threading

import pytest

from launcher.errors import EnvironmentProblem
from launcher.protocol.messages import AgentSignalled, OutputLine, UserNote
from launcher.supervision.handshake import HandshakeError, authenticate
from launcher.supervision.tcp_connection import AgentListener, connect_to_session

from .conftest import two_free_ports

KEY = b"k" * 64


@contextlib.contextmanager
def gate(*names):
    """Open a gate in a thread; yield its port, what it says, and a function that waits for the connections."""
    port, said, arrived = two_free_ports(), [], {}
    opened = AgentListener(port=port, key=KEY, hosts=dict(enumerate(names, start=1)))
    thread = threading.Thread(target=lambda: arrived.update(opened.gather(timeout_s=30, say=said.append)))
    thread.start()

    def everybody():
        thread.join()
        return arrived

    try:
        yield port, said, everybody
    finally:
        thread.join()
        opened.close()


def call(port, index, key=KEY, timeout_s=10):
    return connect_to_session("127.0.0.1", port=port, index=index, key=key, timeout_s=timeout_s, say=lambda text: None)


def test_messages_go_both_ways_whole():
    with gate("node1") as (port, _, everybody):
        peer, connection = call(port, 1), everybody()["node1"]
        text = "ü" * 100_000
        connection.send(UserNote(text=text))
        peer.setblocking(True)
        received = b""
        while not received.endswith(b"\n"):
            connection.flush()
            received += peer.recv(1 << 16)
        assert json.loads(received) == {"kind": "user_note", "text": text}
        peer.sendall(OutputLine(source=3, text="a").encode() + AgentSignalled(signal=7).encode()[:5])
        assert [message.text for message in connection.receive()] == ["a"]
        peer.sendall(AgentSignalled(signal=7).encode()[5:])
        assert connection.receive() == [AgentSignalled(signal=7)]
        peer.close()
        assert connection.receive() is None


def test_the_gate_waits_for_everybody_and_takes_the_later_of_two():
    with gate("node1", "node2") as (port, _, everybody):
        first = call(port, 1)
        again = call(port, 1)
        other = call(port, 2)
        assert everybody().keys() == {"node1", "node2"}
        first.setblocking(True)
        assert first.recv(1) == b""
        for peer in (again, other):
            with pytest.raises(BlockingIOError):
                peer.recv(1)
        for peer in (first, again, other):
            peer.close()


@pytest.mark.parametrize("index", [1, 2, -1])
def test_who_does_not_know_the_key_is_refused(index):
    with gate("node1") as (port, said, _):
        with pytest.raises(EnvironmentProblem, match=f"127.0.0.1:{port}"):
            call(port, index, key=b"other", timeout_s=0)
        call(port, 1).close()
    assert len(said) == 1
    assert said[0].startswith("refused a connection from 127.0.0.1: it ")


NOISE = (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 5000, b"[]\n", b'{"index": "1", "nonce": 2}\n', b'{"index": true}\n', b"")


@pytest.mark.parametrize("noise", NOISE)
def test_strangers_disturb_nobody(noise):
    with gate("node1") as (port, said, everybody):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
            stranger.sendall(noise)
            with contextlib.suppress(OSError):  # it may have been hung up on by now
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(100) == b""
        call(port, 1).close()
        assert list(everybody()) == ["node1"]
    assert len(said) == 1


def test_a_pod_refuses_a_gate_that_does_not_know_the_key():
    ours, theirs = socket.socketpair()

    def pretend():
        theirs.recv(1000)
        theirs.sendall(json.dumps({"nonce": "0" * 64, "proof": "0" * 64}).encode() + b"\n")

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(HandshakeError, match="does not know the key"):
        authenticate(ours, index=1, key=KEY)
    thread.join()
    ours.close()
    theirs.close()


def test_a_proof_serves_once_only():
    """What one pod was heard to say does not let another in: the gate's nonce is new each time."""
    heard = []

    class Recorder(socket.socket):
        def sendall(self, data, *flags):
            heard.append(data)
            super().sendall(data, *flags)

    with gate("node1", "node2") as (port, said, everybody):
        recorder = Recorder()
        recorder.connect(("127.0.0.1", port))
        authenticate(recorder, index=1, key=KEY)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as replay:
            replay.sendall(heard[0])
            replay.recv(1000)
            replay.sendall(heard[1])
            assert replay.recv(100) == b""
        call(port, 2).close()
        assert len(everybody()) == 2
    assert [text.rpartition(" and ")[2] for text in said] == ["does not know the key of this run"]
    recorder.close()


def test_nobody_waits_for_ever():
    port, said = two_free_ports(), []
    with pytest.raises(EnvironmentProblem, match="node1 did not connect within 0 s"):
        AgentListener(port=port, key=KEY, hosts={1: "node1"}).gather(timeout_s=0, say=said.append)
    with pytest.raises(EnvironmentProblem, match="did not accept this agent within 1 s: Connection refused"):
        connect_to_session("127.0.0.1", port=port, index=1, key=KEY, timeout_s=1, say=said.append)
    assert said == [f"waiting for the first pod, 127.0.0.1:{port}: Connection refused"]
    with pytest.raises(EnvironmentProblem, match="did not accept this agent within 0 s"):
        connect_to_session("no-such-pod.invalid", port=port, index=1, key=KEY, timeout_s=0, say=said.append)
