"""Unknown peers and broken agents against one listener and one session: each is closed alone."""

import contextlib
import dataclasses
import io
import json
import os
import resource
import socket
import struct
import threading
from types import SimpleNamespace

import pytest

from launcher.backends.kubernetes import leader
from launcher.errors import EXIT_STALLED, EnvironmentProblem
from launcher.protocol.messages import (
    MAX_TEXT_CHARS,
    AgentExited,
    AgentIdle,
    AgentReady,
    CommandExited,
    FinishAgent,
    HostPrepared,
    LauncherStarted,
    OutputLine,
    Ping,
    RankExited,
    RankHeartbeat,
    RankRaised,
    StartRanks,
    UserNote,
)
from launcher.protocol.plan import Host
from launcher.protocol.session_file import locate_this_process
from launcher.supervision.console import Console
from launcher.supervision.handshake import HandshakeError, authenticate
from launcher.supervision.session import Session
from launcher.supervision.tcp_connection import MAX_PENDING, AgentListener, TcpConnection, connect_to_session
from tests.ports import free_port

KEY = b"k" * 64
NONCE, PROOF = "a" * 64, "b" * 64
HANDSHAKE_S = 1.0
CLAIM = json.dumps({"index": 1, "nonce": NONCE}).encode() + b"\n"


class Listening:
    """A listener in a thread. Host 1 connects repeatedly, host 2 only at the end, so it stays open."""

    def __init__(self):
        self.port, self.said, self.arrived = free_port(together=2), [], {}
        self.listener = AgentListener(port=self.port, key=KEY, hosts={1: "node1", 2: "node2"}, handshake_s=HANDSHAKE_S)
        self.thread = threading.Thread(target=self._gather, daemon=True)
        self.thread.start()

    def _gather(self):
        self.arrived.update(self.listener.gather(timeout_s=300, say=self.said.append))

    def connect_as(self, index):
        """Connect as an agent that knows the key, with one attempt only."""
        return connect_to_session("127.0.0.1", port=self.port, index=index, key=KEY, timeout_s=0, say=lambda text: None)

    def connect_peer(self):
        peer = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return peer


@pytest.fixture(scope="module")
def listening():
    opened = Listening()
    yield opened
    if opened.thread.is_alive():
        opened.connect_as(2).close()
    opened.thread.join(30)
    opened.listener.close()


def is_closed(peer):
    """Return whether the other end closes the connection; what it still says is read."""
    try:
        while peer.recv(1000):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


FIRST_LINES = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\n",
    "zero bytes": bytes(5000),
    "an endless line": b"a" * 1_000_000,
    "only a newline": b"\n",
    "deep lists": b"[" * 1023 + b"\n",
    "deep objects": b'{"a":' * 200 + b"\n",
    "a deep list in a field": b'{"index": 1, "nonce": ' + b"[" * 400 + b"]" * 400 + b"}\n",
    "a lone surrogate": b'{"index": 1, "nonce": "\\ud800"}\n',
    "invalid UTF-8": b'{"index": 1, "nonce": "\xff\xfe"}\n',
    "UTF-16": '{"index": 1}\n'.encode("utf-16"),
    "a list": b"[1, 2]\n",
    "a list of pairs": b'[["index", 1], ["nonce", "' + NONCE.encode() + b'"]]\n',
    "a number": b"1e999\n",
    "null": b"null\n",
    "no fields": b"{}\n",
    "NaN for an index": b'{"index": NaN, "nonce": "' + NONCE.encode() + b'"}\n',
    "a fraction for an index": b'{"index": 1.0, "nonce": "' + NONCE.encode() + b'"}\n',
    "truth for an index": b'{"index": true, "nonce": "' + NONCE.encode() + b'"}\n',
    "a huge index": b'{"index": ' + b"9" * 900 + b', "nonce": "' + NONCE.encode()[:30] + b'"}\n',
    "an unknown index": b'{"index": -1, "nonce": "' + NONCE.encode() + b'"}\n',
    "text for an index": b'{"index": "1", "nonce": "' + NONCE.encode() + b'"}\n',
    "a list for a nonce": b'{"index": 1, "nonce": []}\n',
    "an empty nonce": b'{"index": 1, "nonce": ""}\n',
    "a duplicate name": b'{"index": 2, "index": 1, "nonce": "' + NONCE.encode() + b'"}\n',
    "a field too many": b'{"index": 1, "nonce": "' + NONCE.encode() + b'", "x": 1}\n',
    "two lines at once": CLAIM + CLAIM,
    "an end in mid-line": None,
}


@pytest.mark.parametrize("name", FIRST_LINES)
def test_invalid_first_line_closes_its_peer_alone(listening, name):
    with listening.connect_peer() as peer:
        with contextlib.suppress(ConnectionError):  # it may be refused while it still sends
            peer.sendall(FIRST_LINES[name] or CLAIM[:20])
            if FIRST_LINES[name] is None:
                peer.shutdown(socket.SHUT_WR)
        assert is_closed(peer)
    listening.connect_as(1).close()


SECOND_LINES = {
    "a wrong proof": json.dumps({"proof": PROOF}).encode(),
    "a lone surrogate": b'{"proof": "\\ud800"}',
    "letters beyond ASCII": json.dumps({"proof": "ü" * 64}).encode(),
    "deep lists": b"[" * 1023,
    "the first line again": CLAIM.strip(),
    "no proof": b'{"proof": null}',
    "a number of many digits": b'{"proof": ' + b"1" * 1000 + b"}",
}


@pytest.mark.parametrize("name", SECOND_LINES)
def test_invalid_second_line_closes_its_peer_alone(listening, name):
    with listening.connect_peer() as peer:
        peer.sendall(CLAIM)
        assert peer.recv(1000).endswith(b"\n")
        peer.sendall(SECOND_LINES[name] + b"\n")
        assert is_closed(peer)
    listening.connect_as(1).close()


@pytest.mark.parametrize("sent", [b"", CLAIM[:9], CLAIM])
def test_reset_closes_its_peer_alone(listening, sent):
    peer = listening.connect_peer()
    peer.sendall(sent)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    listening.connect_as(1).close()


def test_slow_peer_does_not_block_the_listener(listening):
    """The whole handshake has one deadline, and other peers do not wait for it."""
    with listening.connect_peer() as slow:
        slow.settimeout(0.1)
        gone = None
        for byte in CLAIM[:-1]:
            with contextlib.suppress(ConnectionError):
                slow.send(bytes([byte]))
            try:
                gone = slow.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionResetError:
                gone = True
            break
        assert gone, "it was never closed"
        listening.connect_as(1).close()


def test_many_idle_connections_leave_room_for_an_agent(listening):
    with contextlib.ExitStack() as crowd:
        for _ in range(400):
            crowd.enter_context(listening.connect_peer())
        listening.connect_as(1).close()


def test_refusals_are_reported_and_limited(listening):
    assert any("rejected a connection from 127.0.0.1: it " in text for text in listening.said)
    for _ in range(30):
        with listening.connect_peer() as peer:
            peer.sendall(b"x\n")
            assert is_closed(peer)
    assert len(listening.said) <= 30


def test_agent_times_out_on_a_slow_session():
    agent, session = socket.socketpair()
    over = threading.Event()

    def drip():
        while not over.wait(0.05):
            session.send(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    with pytest.raises(HandshakeError, match="did not finish the handshake"):
        authenticate(agent, index=1, key=KEY, timeout_s=0.3)
    over.set()
    thread.join()
    agent.close()
    session.close()


def message(kind, **fields):
    return json.dumps({"kind": kind, **fields}).encode() + b"\n"


HEARTBEAT = {"rank": 0, "phase": "forward", "step": 1, "age_s": 0.0, "numbers": {}}
END = {"rank": 0, "time": 1.0, "code": 0, "signal": None, "tail": "", "by_launcher": False}
COMMAND = {"name": "n", "role": "prepare", "time": 1.0, "code": 1, "signal": None, "tail": "", "reason": ""}
RAISED = {"rank": 0, "time": 1.0, "code": 1, "error": "E", "traceback": ""}
BROKEN_MESSAGES = {
    "half JSON": b'{"kind": "output_line", "source": 1}}\n',
    "deep": b'{"kind": ' + b"[" * 100_000 + b"}\n",
    "no JSON at all": b'{"kind": \xff\xfe}\n',
    "no kind known": message("surprise"),
    "a kind that is a list": message([]),
    "a kind of the session": StartRanks().encode(),
    "an order": FinishAgent(exit_code=0).encode(),
    "a field missing": message("output_line", source=1),
    "a field too many": message("output_line", source=1, text="a", more=1),
    "a rank that is none": message("rank_heartbeat", **HEARTBEAT | {"rank": 999}),
    "a negative rank": message("rank_heartbeat", **HEARTBEAT | {"rank": -1}),
    "a line of no rank": message("output_line", source=10**6, text="a"),
    "a rank that is text": message("rank_heartbeat", **HEARTBEAT | {"rank": "0"}),
    "a step that is a truth": message("rank_heartbeat", **HEARTBEAT | {"step": True}),
    "a number of endless size": b'{"kind": "user_note", "text": ' + b"9" * 10_000 + b"}\n",
    "an age that is NaN": message("rank_heartbeat", **HEARTBEAT | {"age_s": float("nan")}),
    "an age beyond all": message("rank_heartbeat", **HEARTBEAT).replace(b'"age_s": 0.0', b'"age_s": 1e999'),
    "numbers that are text": message("rank_heartbeat", **HEARTBEAT | {"numbers": {"loss": "x"}}),
    "numbers that are a list": message("rank_heartbeat", **HEARTBEAT | {"numbers": []}),
    "a signal that is none": message("rank_exited", **END | {"signal": 4000, "code": None}),
    "a code that is huge": message("rank_exited", **END | {"code": 2**70}),
    "a code that the system cuts to 0": message("rank_exited", **END | {"code": 256}),
    "a code below 0": message("rank_exited", **END | {"code": -256}),
    "a command's code that is cut to 0": message("command_exited", **COMMAND | {"code": 512}),
    "an exception with a code of success": message("rank_raised", **RAISED | {"code": 0}),
    "an exception with a code that is cut to 0": message("rank_raised", **RAISED | {"code": 256}),
    "an agent's code that is cut to 0": message("agent_exited", code=256, signal=None),
    "a tail that is null": message("rank_exited", **END | {"tail": None}),
    "a signal to end by": message("agent_signalled", signal=0),
    "an invalid location": message("agent_ready", scratch="/", location={"pid": "x"}, code=""),
    "a location that is a list": message("agent_ready", scratch="/", location=[], code=""),
    "the start of a host unknown": message("launcher_started", host="elsewhere"),
    "a chunk at half a byte": message("file_chunk", path="a", offset=0.5, data="", size=0, grows=True),
}


@pytest.fixture(scope="module")
def reasons(plan_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "logs").mkdir()
    (folder / "precious").mkdir()
    names = ["good", *(f"bad{number}" for number in range(len(BROKEN_MESSAGES)))]
    hosts = [
        Host(name=name, slots=1, cores=1, memory_bytes=2**34, address=f"10.0.0.{number}")
        for number, name in enumerate(names)
    ]
    plan = dataclasses.replace(plan_of(hosts=hosts), run_dir=str(folder), heartbeat_timeout_s=0.0)
    screen, peers, reasons = io.StringIO(), {}, {}
    session = Session(plan, console=Console(screen), signals=[], job={})
    agents = session._agents
    host_lost = agents._on_lost

    def note(host, failure):
        reasons[host] = failure.reason
        host_lost(host, failure)

    agents._on_lost = note

    def connect(host):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            peers[host.host.name] = socket.create_connection(listener.getsockname())
            return TcpConnection(host.host.name, listener.accept()[0])

    agents.connect(connect)
    location = locate_this_process()
    peers["good"].sendall(AgentReady(scratch=str(folder / "precious"), location=location, code="").encode())
    for number, payload in enumerate(BROKEN_MESSAGES.values()):
        peers[f"bad{number}"].sendall(payload)
    for _ in range(200):
        agents.poll()
        if len(reasons) == len(BROKEN_MESSAGES):
            break
    surrogate = UserNote(text="a\udcffb").encode()
    peers["good"].sendall(OutputLine(source=0, text="still here").encode() + b"\n\nan ssh banner\n" + surrogate)
    for _ in range(3):
        agents.poll()
    agents.close()
    reasons["good"] = screen.getvalue()
    for peer in peers.values():
        peer.close()
    assert (folder / "precious").is_dir(), "an agent elsewhere names no folder to remove here"
    return reasons


@pytest.mark.parametrize("name", BROKEN_MESSAGES)
def test_malformed_message_loses_its_host_with_a_named_cause(reasons, name):
    host = f"bad{list(BROKEN_MESSAGES).index(name)}"
    assert reasons[host].startswith(f"the connection to {host} was closed: its agent sent a ")
    assert len(reasons[host]) < 300


def test_the_session_goes_on_with_the_others(reasons):
    assert "good:0 | still here" in reasons["good"]
    assert "good | a" in reasons["good"]


@pytest.fixture
def pair(plan_of, tmp_path):
    """Yield a session of two hosts with a rank each, and the peers that are their agents."""
    (tmp_path / "logs").mkdir()
    hosts = [Host(name=name, slots=1, cores=1, memory_bytes=2**34, address="10.0.0.1") for name in ("node0", "node1")]
    plan = dataclasses.replace(plan_of(hosts=hosts), run_dir=str(tmp_path), heartbeat_timeout_s=0.0)
    peers = {}

    def connect(host):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            peers[host.host.name] = socket.create_connection(listener.getsockname())
            return TcpConnection(host.host.name, listener.accept()[0])

    session = Session(plan, console=Console(io.StringIO()), signals=[], job={})
    session._agents.connect(connect)
    yield session, peers
    session._agents.close()
    for peer in peers.values():
        peer.close()


def exchange(session, until=lambda: False):
    """Let the session read and decide for a moment, or until something holds."""
    for _ in range(10):
        session._agents.poll()
        session._decide()
        if until():
            return


def test_an_error_that_values_of_a_peer_cause_loses_that_host_alone(pair, monkeypatch):
    session, peers = pair
    monkeypatch.setattr(session._console, "progress", lambda *values: int("9" * 5000))
    peers["node1"].sendall(RankHeartbeat(rank=0, phase="x", step=1, age_s=0.0).encode())
    exchange(session, until=lambda: session._agents.lost)
    assert session._agents.lost == ["node1"]
    reason = session._outcome().failure.reason
    assert reason.startswith("the connection to node1 was closed: its agent sent a message rank_heartbeat that causes")
    assert "in _show_progress" in (session._run_dir.log_of("node1", "agent")).read_text()


def test_an_error_of_this_program_is_not_hidden(pair, monkeypatch):
    session, peers = pair
    monkeypatch.setattr(session._console, "progress", lambda *values: {}["a bug"])
    peers["node1"].sendall(RankHeartbeat(rank=0, phase="x", step=1, age_s=0.0).encode())
    with pytest.raises(KeyError, match="a bug"):
        exchange(session)


READY = AgentReady(scratch="/", location=locate_this_process(), code="").encode()
PREPARED = HostPrepared().encode()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"node0": READY + PREPARED, "node1": READY}, "node1 made no progress in preparing for "),
        (
            {"node0": READY + PREPARED + LauncherStarted().encode(), "node1": READY + PREPARED},
            "node1 made no progress in starting its ranks for ",
        ),
    ],
    ids=["preparing", "starting"],
)
def test_a_host_that_sends_keepalives_alone_is_lost_and_named(pair, sent, said):
    session, peers = pair
    for host, data in sent.items():
        peers[host].sendall(data)
    exchange(session)
    for agent in session._agents._agents.values():
        agent.last_event_at -= 2 * session._plan.stall_timeout_s
        peers[agent.connection.host].sendall(Ping().encode())
    exchange(session, until=lambda: session._failure)
    assert session._agents.lost == ["node1"]
    assert session._failure.reason.startswith(said)
    assert session._outcome().exit_code == EXIT_STALLED


@pytest.mark.parametrize("before", [b"", AgentExited(code=0, signal=None).encode()])
def test_an_early_end_of_all_ends_the_run_at_once(pair, before):
    session, peers = pair
    peers["node1"].sendall(before + AgentIdle().encode())
    exchange(session, until=lambda: session._failure)
    assert session._failure.reason == (
        "the connection to node1 was closed: its agent sent a message agent_idle before rank 1 had exited"
    )


def test_a_launcher_that_ends_well_without_its_ranks_ends_the_run_at_once(pair):
    session, peers = pair
    over = CommandExited(name="n", role="launcher", time=1.0, code=0, signal=None, tail="")
    peers["node1"].sendall(over.encode() + AgentIdle().encode())
    exchange(session, until=lambda: session._failure)
    assert session._failure.reason.startswith("rank 1 on node1 never reported its exit")
    assert not session._agents.lost


@pytest.mark.parametrize("code", [0, 3, None])
def test_an_end_of_all_is_accepted_once_ranks_have_exited_or_failed(pair, code):
    session, peers = pair
    if code is None:
        session._cancel(15)
    else:
        end = RankExited(rank=1, time=1.0, code=code, signal=None, tail="")
        peers["node1"].sendall(end.encode())
    peers["node1"].sendall(AgentIdle().encode())
    exchange(session)
    assert not session._agents._agents["node1"].is_working
    assert not session._agents.lost


def test_a_text_of_megabytes_is_cut_before_it_is_searched_and_shown(pair):
    session, peers = pair
    said = "begin " + "x" * 3_000_000 + " end"
    peers["node1"].setblocking(True)
    raised = RankRaised(rank=1, time=1.0, code=1, error=said, traceback=said).encode()
    thread = threading.Thread(target=peers["node1"].sendall, args=(raised,))
    thread.start()
    for _ in range(1000):
        session._agents.poll()
        session._decide()
        if session._failure:
            break
    thread.join()
    failure = session._outcome().failure
    assert len(failure.reason) < 5000
    for text in (failure.error, failure.traceback):
        assert len(text) < MAX_TEXT_CHARS + 100
        assert (text[:6], text[-4:]) == ("begin ", " end")
        assert "characters are left out" in text
    assert all(len(line) < 5000 for line in session._run_dir.timeline.read_text().splitlines())


def test_a_failed_run_never_has_an_exit_code_of_success(pair):
    session, peers = pair
    peers["node1"].sendall(RankExited(rank=1, time=1.0, code=None, signal=None, tail="").encode())
    exchange(session, until=lambda: session._failure)
    outcome = session._outcome()
    assert (outcome.status, outcome.exit_code, outcome.failure.exit_code) == ("failed", 1, 1)


def test_a_listener_without_a_free_descriptor_says_so():
    said, peers = [], []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    listener = AgentListener(port=0, key=KEY, hosts={1: "node1"})
    for _ in range(2):
        peer = socket.socket()
        peer.connect(listener._listener.getsockname())
        peers.append(peer)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        listener._poll(said.append)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        listener.close()
        for peer in peers:
            peer.close()
    assert said == [
        f"no further connection can be accepted now: this process has no free descriptor (ulimit -n: {lowest_free})"
    ]


def test_the_first_pod_makes_room_for_all_others_before_they_connect(plan_of, monkeypatch, tmp_path):
    hosts = [Host(name=f"n{number}", slots=1, cores=1, memory_bytes=2**34, address="a") for number in range(600)]
    plan = dataclasses.replace(plan_of(), run_dir=str(tmp_path))
    plan = dataclasses.replace(plan, hosts=tuple(dataclasses.replace(plan.hosts[0], host=host) for host in hosts))
    seen = []

    class Listener:
        def __init__(self, **_):
            seen.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0])

        def gather(self, **_):
            raise EnvironmentProblem("far enough")

    monkeypatch.setattr(leader, "AgentListener", Listener)
    config = SimpleNamespace(session_port=1, job="j")
    executor = leader.PodExecutor(SimpleNamespace(gather_timeout_s=1.0), config, key=KEY, say=print)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        with pytest.raises(EnvironmentProblem, match="far enough"):
            executor.submit(plan)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert seen[0] >= 600 * 2 + MAX_PENDING
