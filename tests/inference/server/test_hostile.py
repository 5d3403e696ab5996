"""Clients that mean badly, before our own engines and before vLLM: nothing but such a client is affected."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from tests.inference.server.conftest import MODEL, Served, _starter, fake_vllm

KEY = "k"
BODY = json.dumps({"model": MODEL, "prompt": "abc", "max_tokens": 3, "temperature": 0}).encode()


@dataclass
class Target:
    """A server that is attacked, and how an ordinary client asks it."""

    served: Served
    is_proxy: bool

    def answers(self) -> bool:
        """Whether an ordinary request gets what it should."""
        answer = self.served.http.post("/v1/completions", content=BODY, headers={"authorization": f"Bearer {KEY}"})
        if self.is_proxy:
            return answer.text == "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
        return bool(answer.json()["choices"][0]["text"] == "abc")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.served.port), timeout=20)


@pytest.fixture(scope="module", params=["front", "proxy"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Our own engines without keys, and vLLM behind a key."""
    folder = tmp_path_factory.mktemp("hostile")
    starter = _starter(lambda: folder / "served")
    begin = next(starter)
    if request.param == "front":
        yield Target(begin("job.read_timeout_s=1"), is_proxy=False)
    else:
        (folder / "weights").mkdir()
        words = (f"job.vllm_python={fake_vllm(folder)}", f"model.weights={folder}/weights", "job.read_timeout_s=1")
        yield Target(begin("job.engine=vllm", *words, env={"LAUNCHER_API_KEYS": KEY}), is_proxy=True)
    next(starter, None)


@pytest.fixture(autouse=True)
def serves_on(target: Target) -> Iterator[None]:
    """After every attack an ordinary client is answered as before."""
    yield
    assert target.answers()


def head(
    *lines: str | bytes,
    first: str = "POST /v1/completions HTTP/1.1",
    host: bytes = b"host: localhost\r\n",
    key: str = KEY,
) -> bytes:
    """Return a request's head with the key."""
    fields = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\r\n" for line in lines)
    return (
        first.encode()
        + b"\r\n"
        + host
        + (f"authorization: Bearer {key}\r\n" if key else "").encode()
        + fields
        + b"\r\n"
    )


def get(path: str, method: str = "GET", **more: Any) -> bytes:
    return head(first=f"{method} {path} HTTP/1.1", **more)


CHUNKED, LENGTH = "transfer-encoding: chunked", f"content-length: {len(BODY)}"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
REFUSED: dict[str, tuple[bytes, int]] = {
    "length and encoding": (head(LENGTH, CHUNKED) + CHUNKS, 400),
    "encoding and length": (head(CHUNKED, "content-length: 4") + CHUNKS, 400),
    "two lengths": (head(LENGTH, "content-length: 4") + BODY, 400),
    "the same length twice": (head(LENGTH, LENGTH) + BODY, 400),
    "lengths in one header": (head("content-length: 5, 5") + b"12345", 400),
    "a length with a sign": (head("content-length: +5") + b"12345", 400),
    "a negative length": (head("content-length: -5"), 400),
    "a hexadecimal length": (head("content-length: 0x5") + b"12345", 400),
    "a length of 40 digits": (head("content-length: " + "9" * 40), 400),
    "a length of a terabyte": (head("content-length: 1000000000000"), 413),
    "an encoding that is none": (head("transfer-encoding: identity", LENGTH) + BODY, 400),
    "two encodings": (head("transfer-encoding: gzip, chunked") + CHUNKS, 400),
    "an encoding twice": (head(CHUNKED, CHUNKED) + CHUNKS, 400),
    "an encoding behind a tab": (head(b"transfer-encoding:\x0bchunked", LENGTH) + CHUNKS, 400),
    "an encoding in HTTP/1.0": (head(CHUNKED, first="POST /v1/completions HTTP/1.0") + CHUNKS, 400),
    "a space before the colon": (head("transfer-encoding : chunked", LENGTH) + CHUNKS, 400),
    "a folded header": (head("x: 1", " transfer-encoding: chunked", LENGTH) + BODY, 400),
    "lines without carriage return": (head(LENGTH).replace(b"\r\n", b"\n") + BODY, 400),
    "one line without carriage return": (head("x: 1\n" + CHUNKED, LENGTH) + BODY, 400),
    "a lone carriage return": (head("x: 1\r" + CHUNKED, LENGTH) + BODY, 400),
    "NUL in a header": (head(b"x: \x00", LENGTH) + BODY, 400),
    "NUL in a name": (head(b"x\x00y: 1", LENGTH) + BODY, 400),
    "a header without a colon": (head("nothing", LENGTH) + BODY, 400),
    "two hosts": (head("host: localhost", LENGTH) + BODY, 400),
    "no host": (get("/health/live", host=b""), 400),
    "two keys": (head("authorization: Bearer other", LENGTH) + BODY, 400),
    "a chunk size that is no number": (head(CHUNKED) + b"zz\r\n", 400),
    "a negative chunk size": (head(CHUNKED) + b"-1\r\n", 400),
    "a chunk size of 30 digits": (head(CHUNKED) + b"f" * 30 + b"\r\n", 400),
    "a chunk longer than it says": (head(CHUNKED) + b"2\r\nabcdef\r\n0\r\n\r\n", 400),
    "a chunk that never ends": (head(CHUNKED) + b"fffffffffff\r\n" + b"a" * (3 << 20), 413),
    "thousands of tiny chunks": (head(CHUNKED) + b"1\r\n \r\n" * 50_000, 400),
    "a header of 20 kB": (head("x: " + "a" * 20_000), 431),
    "a header without an end": (head()[:-2] + b"x: " + b"a" * 200_000, 431),
    "a thousand headers": (head(*(f"x{n}: 1" for n in range(1000))), 431),
    "a target of 20 kB": (get("/" + "a" * 20_000), 431),
    "an absolute target": (get("http://localhost/v1/models", key=""), 400),
    "an absolute target elsewhere": (get("http://example.org/health/live", key=""), 400),
    "two slashes": (get("//v1/models", key=""), 400),
    "two slashes within": (get("/v1//models"), 400),
    "dots": (get("/health/../v1/models", key=""), 400),
    "encoded dots": (get("/health/%2e%2E/v1/models", key=""), 400),
    "dots with a parameter": (get("/health/..;/v1/models", key=""), 400),
    "an encoded slash": (get("/v1%2Fmodels"), 400),
    "encoded dots behind a model": (get("/v1/models/..%2f..%2fmetrics"), 400),
    "an encoded slash behind a model": (get("/v1/models/a%2fb"), 404),
    "an encoded backslash": (get("/v1%5cmodels"), 400),
    "a backslash": (get("/v1\\models"), 400),
    "an encoded NUL": (get("/v1/models%00"), 400),
    "a doubly encoded slash": (get("/v1%252fmodels"), 400),
    "a fragment": (get("/v1/models#x"), 400),
    "no slash": (get("v1/models", key=""), 400),
    "every path": (get("*", "OPTIONS", key=""), 400),
    "a tunnel": (get("localhost:22", "CONNECT", key=""), 400),
    "a method that is none": (get("/v1/completions", "BREW"), 405),
    "TRACE": (get("/v1/completions", "TRACE"), 405),
    "a method of control characters": (b"G\x01T / HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
    "a body where none belongs": (head(LENGTH, first="GET /v1/models HTTP/1.1") + BODY, 400),
    "chunks where none belong": (head(CHUNKED, first="GET /health/live HTTP/1.1", key=""), 400),
    "a body for an open path": (head(CHUNKED, first="POST /health/live HTTP/1.1", key=""), 400),
    "an expectation that is none": (head("expect: gold", LENGTH), 417),
    "HTTP/0.9": (b"GET /health/live\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "HTTP/9.9": (head(LENGTH, first="POST /v1/completions HTTP/9.9") + BODY, 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2 + b"\r\n\r\n", 400),
    "a WebSocket": (
        get("/v1/completions", host=b"host: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"),
        405,
    ),
    "another path": (get("/v1/load_lora_adapter", "POST"), 404),
    "a path behind an open one": (get("/health/live/x", "POST"), 404),
}  # fmt: skip
FRONT_REFUSED: dict[str, tuple[bytes, int]] = {
    "another host": (get("/health/live", host=b"host: example.org\r\n"), 403),
    "another host with a port": (get("/v1/models", host=b"host: example.org:80\r\n"), 403),
    "a host behind a user": (get("/v1/models", host=b"host: localhost@example.org\r\n"), 403),
    "an address of others": (get("/v1/models", host=b"host: 192.0.2.1\r\n"), 403),
    "an empty host": (get("/v1/models", host=b"host:\r\n"), 403),
    "a page of others": (head("origin: http://example.org", LENGTH) + BODY, 403),
    "a page of no origin": (head("origin: null", LENGTH) + BODY, 403),
}
PROXY_REFUSED: dict[str, tuple[bytes, int]] = {
    "no key": (head(LENGTH, key="") + BODY, 401),
    "no key and a body to come": (head(CHUNKED, "expect: 100-continue", key=""), 401),
    "a key of other letters": (head(b"authorization: Bearer \xff\xfe", LENGTH, key="") + BODY, 401),
    "an empty key": (head("authorization: Bearer ", LENGTH, key="") + BODY, 401),
    "no key for a path that is none": (get("/reset_prefix_cache", "POST", key=""), 401),
    "no key for a path that looks open": (get("/metrics/x", key=""), 401),
    "no key and capital letters": (get("/V1/models", key=""), 401),
    "no key and a slash behind": (get("/health/live/", key=""), 401),
    "a path of vLLM that changes it": (get("/reset_prefix_cache", "POST"), 404),
    "an encoded letter, no key": (get("/%761/models", key=""), 401),
    "more sequences than allowed": (
        head("content-length: 29") + b'{"prompt": ["a"], "n": 10000}', 400,
    ),
    "a body of brackets": (head("content-length: 1000000") + b"[" * 1_000_000, 400),
}  # fmt: skip


def status_of(target: Target, payload: bytes) -> int:
    """Send bytes; return the status of the first answer."""
    with target.connect() as connection:
        with suppress(ConnectionError):  # it may have read enough
            connection.sendall(payload)
        answer = connection.makefile("rb").readline()
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer.split()[1])


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_server_may_take(target: Target, name: str) -> None:
    payload, status = REFUSED[name]
    assert status_of(target, payload) == status


@pytest.mark.parametrize("target", ["front"], indirect=True)
@pytest.mark.parametrize("name", FRONT_REFUSED)
def test_without_keys_hosts_are_checked(target: Target, name: str) -> None:
    payload, status = FRONT_REFUSED[name]
    assert status_of(target, payload) == status


@pytest.mark.parametrize("target", ["proxy"], indirect=True)
@pytest.mark.parametrize("name", PROXY_REFUSED)
def test_keys_are_asked_for_by_default(target: Target, name: str) -> None:
    payload, status = PROXY_REFUSED[name]
    assert status_of(target, payload) == status


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "127.1.2.3", "[::1]:8000", "a.localhost", "localhost."]
)
def test_names_of_this_machine_are_let_in(target: Target, host: str) -> None:
    assert status_of(target, get("/health/live", host=f"host: {host}\r\n".encode())) == 200


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while piece := connection.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


def test_requests_behind_each_other_are_answered_in_turn(target: Target) -> None:
    with target.connect() as connection:
        last = get(
            "/v1/models", host=b"host: localhost\r\nconnection: close\r\n", key="wrong" if target.is_proxy else ""
        )
        connection.sendall(get("/health/live", key="") * 20 + head(LENGTH) + BODY + get("/nothing") + last)
        said = read_all(connection)
    statuses = [part[:3] for part in said.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200"] * 21 + [b"404", b"401" if target.is_proxy else b"200"]


def test_what_is_no_request_behind_one(target: Target) -> None:
    with target.connect() as connection:
        connection.sendall(get("/health/live") + head(LENGTH, CHUNKED) + CHUNKS)
        said = read_all(connection)
    assert [part[:3] for part in said.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400"]


def test_a_client_that_waits_to_be_asked_for_its_body(target: Target) -> None:
    with target.connect() as connection:
        connection.sendall(head(LENGTH, "expect: 100-continue", "connection: close"))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
        connection.sendall(BODY)
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("payload", "status", "word"),
    [
        (head("content-length: 12000000") + b"a" * 12_000_000, 413, b"larger than"),
        (head(CHUNKED) + b"8\r\naaaaaaaa\r\n" * 500_000 + b"0\r\n\r\n", 400, b"in larger chunks"),
        (head("content-length: 12000000", key="wrong", host=b"host: x\r\n") + b"a" * 12_000_000, None, b"key"),
    ],
    ids=["too large", "tiny chunks", "not let in"],
)
def test_a_client_that_sends_on_reads_why_it_is_refused(
    target: Target, payload: bytes, status: int | None, word: bytes
) -> None:
    """Closing at once would reset the connection, and the answer be lost."""
    with target.connect() as connection:
        connection.sendall(payload)
        said = connection.recv(1 << 16)
    assert said.split()[1] == str(status or (401 if target.is_proxy else 403)).encode()
    assert word in said


def test_idle_clients_take_no_room(target: Target) -> None:
    """More of them than largest bodies fit into memory, and none has said how much will come."""
    with ExitStack() as stack:
        begun: list[tuple[str, socket.socket]] = []
        for kind, payload in {
            "body_timeout": head(CHUNKED),
            "a byte": head(CHUNKED) + b"5\r\na",
            "half": head("content-length: 2000000") + b"a",
            "header_timeout": head()[:40],
            "nothing": b"",
        }.items():
            for _ in range(70):
                begun.append((kind, stack.enter_context(target.connect())))
                begun[-1][1].sendall(payload)
        assert target.answers()  # while all of them wait
        for kind, connection in begun[::69]:
            said = read_all(connection)
            assert said.startswith(b"HTTP/1.1 408 "), (kind, said)


def test_headers_and_bodies_that_drip_are_given_up(target: Target) -> None:
    """A byte now and then does not make a deadline longer."""
    with target.connect() as drip_head, target.connect() as drip_body:
        drip_head.sendall(b"GET / HTTP/1.1\r\nx: ")
        drip_body.sendall(head("content-length: 1000"))
        deadline = time.monotonic() + 30
        open_ones = {drip_head: b"", drip_body: b""}
        for connection in open_ones:
            connection.settimeout(0.1)
        ended: dict[socket.socket, bytes] = {}
        while len(ended) < 2:
            assert time.monotonic() < deadline
            for connection in open_ones.keys() - ended.keys():
                try:
                    connection.sendall(b"a")
                    if said := connection.recv(1 << 16):
                        ended[connection] = said
                except TimeoutError:
                    continue
    assert all(said.startswith(b"HTTP/1.1 408 ") for said in ended.values())


@pytest.mark.parametrize(
    "how", ["half-closed", "closed", "reset", "reset in the body", "reset in the head", "never reads"]
)
def test_clients_that_go_or_do_not_take_what_they_asked_for(target: Target, how: str) -> None:
    body = {"model": MODEL, "prompt": how, "max_tokens": 200, "stream": True, "n": 8}
    payload = json.dumps({"pour": 200} if target.is_proxy else body).encode()
    request = head(f"content-length: {len(payload)}") + payload
    with target.connect() as connection:
        cut = {"reset in the body": -5, "reset in the head": 20}.get(how, len(request))
        connection.sendall(request[:cut])
        if how == "half-closed":
            connection.shutdown(socket.SHUT_WR)
        elif how == "never reads":
            assert target.answers()
        elif how == "closed":
            connection.recv(10)
        if how.startswith("reset"):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("target", ["proxy"], indirect=True)
def test_nothing_has_reached_vllm_that_is_not_on_the_list(target: Target) -> None:
    """What all tests above have sent."""
    allowed = ("GET /health ", "POST /v1/completions ", "GET /v1/models ")
    asked = [line.removeprefix("asked ") for line in target.served.output.splitlines() if line.startswith("asked ")]
    assert asked
    assert not [line for line in asked if not line.startswith(allowed)]


def test_hostile_clients_write_nothing_into_the_log(target: Target) -> None:
    """What all tests above have sent."""
    lines = target.served.output.splitlines()
    assert not [line for line in lines if not line.startswith(("asked ", "serving "))]
