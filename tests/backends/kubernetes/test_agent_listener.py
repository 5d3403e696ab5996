"""Agents that connect to the session over TCP: handshake, refusals and messages."""

import contextlib
import json
import socket
import threading

import pytest

from launcher.errors import EnvironmentProblem
from launcher.protocol.messages import AgentSignalled, OutputLine, UserNote
from launcher.supervision.handshake import HandshakeError, authenticate
from launcher.supervision.tcp_connection import AgentListener, connect_to_session
from tests.ports import free_port

KEY = b"k" * 64


@contextlib.contextmanager
def listening(*names):
    """Open a listener in a thread; yield its port, its reports, and a function that waits for the connections."""
    port, said, arrived = free_port(together=2), [], {}
    listener = AgentListener(port=port, key=KEY, hosts=dict(enumerate(names, start=1)))
    thread = threading.Thread(target=lambda: arrived.update(listener.gather(timeout_s=30, say=said.append)))
    thread.start()

    def wait_for_all():
        thread.join()
        return arrived

    try:
        yield port, said, wait_for_all
    finally:
        thread.join()
        listener.close()


def call(port, index, key=KEY, timeout_s=10):
    return connect_to_session("127.0.0.1", port=port, index=index, key=key, timeout_s=timeout_s, say=lambda text: None)


def test_messages_go_both_ways_whole():
    with listening("node1") as (port, _, wait_for_all):
        peer, connection = call(port, 1), wait_for_all()["node1"]
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


def test_listener_waits_for_all_agents_and_uses_the_latest_connection():
    with listening("node1", "node2") as (port, _, wait_for_all):
        first = call(port, 1)
        again = call(port, 1)
        other = call(port, 2)
        assert wait_for_all().keys() == {"node1", "node2"}
        first.setblocking(True)
        assert first.recv(1) == b""
        for peer in (again, other):
            with pytest.raises(BlockingIOError):
                peer.recv(1)
        for peer in (first, again, other):
            peer.close()


@pytest.mark.parametrize("index", [1, 2, -1])
def test_peer_without_the_key_is_refused(index):
    with listening("node1") as (port, said, _):
        with pytest.raises(EnvironmentProblem, match=f"127.0.0.1:{port}"):
            call(port, index, key=b"other", timeout_s=0)
        call(port, 1).close()
    assert len(said) == 1
    assert said[0].startswith("rejected a connection from 127.0.0.1: it ")


NOISE = (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 5000, b"[]\n", b'{"index": "1", "nonce": 2}\n', b'{"index": true}\n', b"")


@pytest.mark.parametrize("noise", NOISE)
def test_unknown_peers_do_not_disturb_agents(noise):
    with listening("node1") as (port, said, wait_for_all):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
            peer.sendall(noise)
            with contextlib.suppress(OSError):  # it may be closed already
                peer.shutdown(socket.SHUT_WR)
                assert peer.recv(100) == b""
        call(port, 1).close()
        assert list(wait_for_all()) == ["node1"]
    assert len(said) == 1


def test_agent_refuses_a_session_without_the_key():
    agent, session = socket.socketpair()

    def pretend():
        session.recv(1000)
        session.sendall(json.dumps({"nonce": "0" * 64, "proof": "0" * 64}).encode() + b"\n")

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(HandshakeError, match="does not have the key"):
        authenticate(agent, index=1, key=KEY)
    thread.join()
    agent.close()
    session.close()


def test_a_proof_is_valid_once():
    """A replayed proof is refused, because the session's nonce is new each time."""
    sent = []

    class Recorder(socket.socket):
        def sendall(self, data, *flags):
            sent.append(data)
            super().sendall(data, *flags)

    with listening("node1", "node2") as (port, said, wait_for_all):
        recorder = Recorder()
        recorder.connect(("127.0.0.1", port))
        authenticate(recorder, index=1, key=KEY)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as replay:
            replay.sendall(sent[0])
            replay.recv(1000)
            replay.sendall(sent[1])
            assert replay.recv(100) == b""
        call(port, 2).close()
        assert len(wait_for_all()) == 2
    assert [text.rpartition(" and ")[2] for text in said] == ["does not have the key of this run"]
    recorder.close()


def test_timeouts():
    port, said = free_port(together=2), []
    with pytest.raises(EnvironmentProblem, match="node1 did not connect within 0 s"):
        AgentListener(port=port, key=KEY, hosts={1: "node1"}).gather(timeout_s=0, say=said.append)
    with pytest.raises(EnvironmentProblem, match="did not accept this agent within 1 s: Connection refused"):
        connect_to_session("127.0.0.1", port=port, index=1, key=KEY, timeout_s=1, say=said.append)
    assert said == [f"waiting for the first pod, 127.0.0.1:{port}: Connection refused"]
    with pytest.raises(EnvironmentProblem, match="did not accept this agent within 0 s"):
        connect_to_session("no-such-pod.invalid", port=port, index=1, key=KEY, timeout_s=0, say=said.append)
