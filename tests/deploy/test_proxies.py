"""nginx and HAProxy themselves, with rendered configurations, before servers that misbehave as a test says."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launch
from tests.deploy.proxies import FILES, KINDS, LoadBalancer, check_command, program, rendered
from tests.deploy.upstreams import Held, Poured, Stepped, Upstream, answer, cut, drain, drop
from tests.helpers import wait_for
from tests.ports import free_port

PATH = "/v1/completions"
Begin = Callable[..., LoadBalancer]
Listen = Callable[..., Upstream]
BODY = json.dumps({"prompt": "x" * 30_000}).encode()
TOKENS = b"data: 1\n\ndata: 2\n\n"
TLS = ("deploy.tls_certificate_file={folder}/site.crt", "deploy.tls_key_file={folder}/site.key")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """``nginx``, then ``haproxy``."""
    return str(request.param)


@pytest.fixture
def begin(kind: str, tmp_path: Path) -> Iterator[Begin]:
    """Start a load balancer before some servers."""
    program(kind)
    with contextlib.ExitStack() as stack:

        def start(
            *upstreams: Upstream | str, words: tuple[str, ...] = (), **options: Callable[[str], str]
        ) -> LoadBalancer:
            addresses = [each if isinstance(each, str) else each.address for each in upstreams]
            named = f"deploy.upstreams=[{','.join(addresses)}]"
            proxy = LoadBalancer(kind, tmp_path / uuid.uuid4().hex[:8], [named, *words], **options)
            stack.callback(proxy.close)
            return proxy

        yield start


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Start a server that behaves in some way."""
    with contextlib.ExitStack() as stack:

        def start(respond: Callable[[socket.socket], None], *, is_ready: bool = True) -> Upstream:
            upstream = Upstream(respond, is_ready=is_ready)
            stack.callback(upstream.close)
            return upstream

        yield start


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    headers: Message
    body: bytes

    @property
    def code(self) -> str:
        """Of an error, which is JSON like the server's."""
        assert self.headers["content-type"] == "application/json"
        return str(json.loads(self.body)["error"]["code"])


def send(
    proxy: LoadBalancer, path: str = PATH, body: bytes | None = BODY, *, headers: dict[str, str] | None = None
) -> http.client.HTTPResponse:
    """Send a request on a connection of its own; return its response, whose body is not read yet."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
    fields = {"Connection": "close", **(headers or {})}  # so that the response owns the connection
    connection.request("GET" if body is None else "POST", path, body, fields)
    return connection.getresponse()


def ask(
    proxy: LoadBalancer, path: str = PATH, body: bytes | None = BODY, *, headers: dict[str, str] | None = None
) -> Answer:
    """Send a request and return the whole response."""
    with send(proxy, path, body, headers=headers) as response:
        return Answer(response.status, response.headers, response.read())


def certificate(folder: Path) -> Path:
    """Write a certificate of this machine and its key."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(folder / "site.key"), "-out", str(folder / "site.crt")]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    return folder / "site.crt"


def test_the_program_itself_accepts_every_option(kind: str, tmp_path: Path) -> None:
    certificate(tmp_path)
    own = {
        "nginx": (f"deploy.log_folder={tmp_path}", f"deploy.temporary_folder={tmp_path}", "deploy.fail_timeout_s=7"),
        "haproxy": ("deploy.metrics_port=9101", "deploy.check_every_s=0.5", "deploy.retried_bytes=131072"),
    }
    many = "deploy.upstreams=[127.0.0.1:8001,'[::1]:8002',localhost:8003]"
    tls = [word.format(folder=tmp_path) for word in TLS]
    timeouts = ("job.read_timeout_s=0.0001", "job.request_timeout_s=1e30", "job.queue_timeout_s=0.25")
    limits = ("deploy.rate_per_minute=1", "job.max_connections=1", "job.max_body_bytes=1024")
    for words in (
        (),
        (many, *tls, "deploy.user=www-data", "deploy.user_group=www-data", *own[kind]),
        ("deploy.host='::1'", *timeouts, *limits),
    ):
        file = tmp_path / FILES[kind]
        file.write_text(rendered(kind, words))
        done = subprocess.run(check_command(kind, file), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "warn" not in f"{done.stdout}{done.stderr}".lower(), done.stderr


def test_each_token_is_sent_at_once(begin: Begin, listen: Listen) -> None:
    stepped = Stepped()
    proxy = begin(listen(stepped))
    with send(proxy) as response:
        for number in (1, 2, 3):  # the server sends the next token only after this one has arrived
            stepped.may_send.release()
            assert response.read(9) == b"data: %d\n\n" % number
        assert response.read() == b""


def test_a_client_that_leaves_ends_its_request_at_the_server(begin: Begin, listen: Listen) -> None:
    poured = Poured()
    with send(begin(listen(poured))) as response:
        response.read(9)
        assert not poured.is_left.is_set()
    assert poured.is_left.wait(20)


def test_a_client_that_leaves_before_the_first_token_ends_its_request(begin: Begin, listen: Listen) -> None:
    held = Held(has_begun=False)
    proxy = begin(listen(held))
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
    connection.request("POST", PATH, BODY)
    assert held.is_asked.wait(20)
    assert not held.is_left.is_set()
    connection.close()
    assert held.is_left.wait(20)


def test_a_request_without_an_answer_goes_to_another_server(begin: Begin, listen: Listen) -> None:
    for broken in (drop, drain):
        bad, good = listen(broken), listen(answer)
        proxy = begin(bad, good)
        for _ in range(4):
            answered = ask(proxy)
            assert (answered.status, answered.body) == (200, TOKENS)
        assert {each.body for each in (*bad.requests, *good.requests)} == {BODY}
        assert bad.requests
        assert len(good.requests) == 4


def test_a_request_that_arrives_in_parts_goes_to_another_server(begin: Begin, listen: Listen) -> None:
    bad, good = listen(drop), listen(answer)
    proxy = begin(bad, good)
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as connection:
            connection.sendall(head + BODY[:1000])
            time.sleep(0.2)  # a load balancer that passed on the first part could not repeat it
            connection.sendall(BODY[1000:])
            with connection.makefile("rb") as received:
                assert b" 200 " in received.readline()
    assert bad.requests
    assert {each.body for each in good.requests} == {BODY}


def test_a_server_that_is_not_there_costs_no_request(begin: Begin, listen: Listen) -> None:
    gone, good = listen(answer), listen(answer)
    gone.close()
    with socket.socket() as reserved:  # no other test's server gets the port
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", int(gone.address.rpartition(":")[2])))
        proxy = begin(gone, good)
        assert [ask(proxy).body for _ in range(4)] == [TOKENS] * 4


def test_an_answer_that_has_begun_is_never_repeated(begin: Begin, listen: Listen) -> None:
    bad, good = listen(cut), listen(answer)
    proxy = begin(bad, good)
    whole: list[bytes] = []
    parts: list[bytes] = []
    for _ in range(4):
        try:
            whole.append(ask(proxy).body)
        except http.client.IncompleteRead as error:
            parts.append(error.partial)
    assert parts == [b"data: 1\n\n"] * len(bad.requests)
    assert whole == [TOKENS] * len(good.requests)
    assert len(parts) + len(whole) == 4
    assert parts


def test_a_draining_server_gets_no_new_requests(kind: str, begin: Begin, listen: Listen) -> None:
    draining, good = listen(drain, is_ready=False), listen(answer)
    words = ("deploy.fail_timeout_s=3600",) if kind == "nginx" else ("deploy.check_every_s=0.1",)
    proxy = begin(draining, good, words=words)
    if kind == "haproxy":
        wait_for(lambda: draining.num_checks > 2, seconds=60, shown=lambda: proxy.output)
    else:
        while not draining.requests:  # nginx learns of it by one request
            assert ask(proxy).body == TOKENS
    seen = len(draining.requests)
    assert [ask(proxy).body for _ in range(6)] == [TOKENS] * 6
    assert len(draining.requests) == seen


def test_a_server_that_has_just_come_back_gets_what_a_draining_one_refuses(
    kind: str, begin: Begin, listen: Listen
) -> None:
    back, other = listen(drain, is_ready=False), listen(answer)
    words = ("deploy.fail_timeout_s=3600",) if kind == "nginx" else ("deploy.check_every_s=0.1",)
    proxy = begin(back, other, words=words)
    while not (back.requests or back.num_checks > 2):  # it is known to refuse
        assert ask(proxy).body == TOKENS
    back.respond, back.is_ready = answer, True
    if kind == "haproxy":
        seen = back.num_checks
        wait_for(lambda: back.num_checks > seen + 2, seconds=60, shown=lambda: proxy.output)
    other.respond, other.is_ready = drain, False
    assert [ask(proxy).body for _ in range(4)] == [TOKENS] * 4


def test_a_server_that_drains_finishes_its_streams(kind: str, begin: Begin, listen: Listen) -> None:
    if kind == "nginx":
        return  # it never asks a server whether it is ready
    held = Held()
    upstream = listen(held)
    proxy = begin(upstream, words=("deploy.check_every_s=0.1",))
    with send(proxy) as response:
        response.read(9)
        upstream.is_ready = False
        seen = upstream.num_checks
        wait_for(lambda: upstream.num_checks > seen + 5, seconds=60, shown=lambda: proxy.output)
        assert ask(proxy).code == "busy"
        held.goes_on.set()
        assert response.read() == b"data: 2\n\n"
    upstream.is_ready = True
    wait_for(lambda: ask(proxy).status == 200, seconds=60, shown=lambda: proxy.output)


STREAM = """
import http.server, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"data: 1\\n\\n")
        time.sleep(600)

http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""


def test_streams_of_a_host_that_is_gone_end(kind: str, begin: Begin, lab_hosts: Any) -> None:
    """Its server is down after some checks, which must not end requests that are about to go elsewhere."""
    if kind == "nginx":
        return  # it waits as long as an answer may take
    lab = lab_hosts(1, prefix="web")
    server = subprocess.Popen(lab.command("web1", [sys.executable, "-c", STREAM]), stdin=subprocess.DEVNULL)
    try:
        words = ("deploy.check_every_s=0.1", "deploy.check_timeout_s=0.2")
        proxy = begin(f"{lab.address('web1')}:8000", words=words)
        wait_for(lambda: ask(proxy, "/health", None).status == 200, shown=lambda: proxy.output)
        with send(proxy) as response:
            response.read(9)
            lab.fault("web1", "cut")
            assert response.read() == b"", "the stream ends, and nothing else arrives"
    finally:
        server.kill()
        server.wait()


def test_errors_of_the_load_balancer_look_like_those_of_the_server(kind: str, begin: Begin, listen: Listen) -> None:
    gone = listen(answer)
    gone.close()
    proxy = begin(gone, words=("job.max_body_bytes=2048",))
    refused = ask(proxy, body=b"{}")
    assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "busy", "2")
    large = ask(proxy, body=b"x" * 2049)
    assert (large.status, large.code) == (413, "body_too_large")
    for path in ("/metrics", "/", "/%6detrics"):
        hidden = ask(proxy, path, None)
        assert (hidden.status, hidden.code) == (404, "not_found"), path
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        received = connection.recv(4096)
    assert b" 400 " in received
    assert (b'"code": "invalid_http"' in received) == (
        kind == "nginx"
    )  # HAProxy answers such bytes with a text of its own


def test_the_server_learns_host_and_client_and_no_lie_about_it(begin: Begin, listen: Listen) -> None:
    upstream = listen(answer)
    ask(begin(upstream), headers={"Host": "models.example.org", "X-Forwarded-For": "192.0.2.1"})
    (request,) = upstream.requests
    assert request.headers["host"] == "models.example.org"
    assert request.headers["x-forwarded-for"] == "127.0.0.1"
    assert request.headers["x-forwarded-proto"] == "http"


def test_each_client_has_a_rate(begin: Begin, listen: Listen) -> None:
    proxy = begin(listen(answer), words=("deploy.rate_per_minute=3",))
    for at in range(5):
        answered = ask(proxy, headers={"X-Forwarded-For": f"192.0.2.{at}"})
        if at < 3:
            assert answered.body == TOKENS
        else:
            assert (answered.status, answered.code) == (429, "rate_limit_exceeded")
            assert answered.headers["retry-after"] == "1"
        assert ask(proxy, "/health/ready", None).status == 200


def test_nginx_counts_networks_of_ipv6_clients(kind: str, begin: Begin, listen: Listen) -> None:
    if kind != "nginx":
        return  # HAProxy masks addresses by itself

    def from_header(text: str) -> str:
        return text.replace("server_name _;", "set_real_ip_from 127.0.0.1;\nreal_ip_header X-Test;")

    proxy = begin(listen(answer), words=("deploy.rate_per_minute=1",), edit=from_header)
    for address, status in {
        "2001:db8:1:2:3:4:5:6": 200,
        "2001:db8:1:2::9": 429,
        "2001:db8:1:3::9": 200,
        "2001:db8::1": 200,
        "2001:db8::1:2:3:4": 429,
        "192.0.2.1": 200,
        "::ffff:192.0.2.1": 429,
        "::ffff:192.0.2.2": 200,
        "192.0.2.3": 200,
    }.items():
        assert ask(proxy, headers={"X-Test": address}).status == status, address


def test_tls(begin: Begin, listen: Listen, tmp_path: Path) -> None:
    trusted = ssl.create_default_context(cafile=str(certificate(tmp_path)))
    upstream = listen(answer)
    proxy = begin(upstream, words=tuple(word.format(folder=tmp_path) for word in TLS))
    connection = http.client.HTTPSConnection("127.0.0.1", proxy.port, timeout=20, context=trusted)
    connection.request("POST", PATH, BODY, {"Connection": "close"})
    with connection.getresponse() as response:
        assert response.read() == TOKENS
    assert upstream.requests[0].headers["x-forwarded-proto"] == "https"
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as plain:
        plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b" 200 " not in plain.recv(4096)
    assert len(upstream.requests) == 1


def test_haproxy_exports_metrics(kind: str, begin: Begin, listen: Listen) -> None:
    if kind != "haproxy":
        return
    port = free_port()
    proxy = begin(listen(answer), words=(f"deploy.metrics_port={port}",))
    ask(proxy)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/metrics", headers={"Connection": "close"})
    with connection.getresponse() as response:
        wanted = b'haproxy_server_http_responses_total{proxy="servers",server="server-1",code="2xx"} 1'
        assert wanted in response.read()


def test_the_commands_of_the_page(launch_in_process: Launch, tmp_path: Path) -> None:
    """In their order, in one folder."""
    both = "deploy.upstreams=[10.0.0.1:8000,10.0.0.2:8000]"
    for kind in KINDS:
        launch_in_process("deploy", "+exp=serve_smollm2", f"deploy={kind}", f"deploy.out={kind}", both).expect(0)
    for kind in KINDS:
        subprocess.run(check_command(kind, tmp_path / kind / FILES[kind]), check=True, capture_output=True)
    words = ("deploy=compose", "deploy.out=stack", "deploy.image=launcher:1", "deploy.servers=2")
    launch_in_process("deploy", "+exp=serve_smollm2", *words).expect(0)
    assert (tmp_path / "stack/compose.yaml").is_file()
