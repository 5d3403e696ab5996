"""What clients get wrong, or mean badly: each an answer to that client alone, and the next one is served."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import psutil
import pytest

from tests.helpers import wait_for
from tests.inference.server.conftest import MODEL, Served, Start

OK = {"model": MODEL, "prompt": "abc", "max_tokens": 3, "temperature": 0}
HUGE = b'{"model": "gpt2_tiny", "prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}"


@pytest.fixture(autouse=True)
def serves_on(served: Served) -> Iterator[None]:
    """After every test the server answers as before."""
    yield
    assert served.complete("abc", max_tokens=3).json()["choices"][0]["text"] == "abc"


def post(served: Served, body: str | bytes, path: str = "/v1/completions") -> Any:
    return served.http.post(path, content=body, headers={"content-type": "application/json"})


def refusal(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model":', b"[1]", b"null", b'"text"', b"\xff\xfe", b"{" * 20_000, b"[" * 20_000, b"nan", HUGE],
    ids=["nothing", "open", "half", "list", "null", "text", "bytes", "deep", "deep list", "nan", "huge"],
)
def test_malformed_bodies(served: Served, body: bytes) -> None:
    refusal(post(served, body))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", '"3"'),
        ("max_tokens", "3.5"),
        ("max_tokens", "0"),
        ("max_tokens", "-1"),
        ("max_tokens", "true"),
        ("temperature", "NaN"),
        ("temperature", "Infinity"),
        ("temperature", "1e999"),
        ("temperature", "-0.1"),
        ("top_p", "0"),
        ("top_p", "1.5"),
        ("n", "0"),
        ("n", "1000000"),
        ("seed", "9223372036854775808"),
        ("stop", '[""]'),
        ("stop", "7"),
        ("logprobs", "21"),
        ("logprobs", "true"),
        ("logit_bias", '{"a": 1}'),
        ("logit_bias", '{"999999999999": 1}'),
        ("logit_bias", '{"1": 101}'),
        ("prompt", "7"),
        ("prompt", "[]"),
        ("prompt", "[[]]"),
        ("prompt", '""'),
        ("prompt", '["a", 1]'),
        ("prompt", "[-1]"),
        ("prompt", "[999999]"),
        ("prompt", "[1.5]"),
        ("stream_options", '{"include_usage": true}'),
        ("min_tokens", "4"),
        ("stream", '"yes"'),
        ("unknown_field", "1"),
    ],
)
def test_wrong_values_are_named(served: Served, field: str, value: str) -> None:
    fields = {name: json.dumps(given) for name, given in OK.items()} | {field: value}
    body = "{" + ",".join(f'"{name}": {text}' for name, text in fields.items()) + "}"
    error = refusal(post(served, body))
    assert (error["param"] or error["message"]).split(".")[0] == field


def test_null_is_a_field_left_out(served: Served) -> None:
    body = {**OK, "suffix": None, "stop": None, "seed": None, "logprobs": None}
    assert post(served, json.dumps(body)).status_code == 200
    error = refusal(post(served, json.dumps({**body, "unknown_field": None})))
    assert (error["param"], error["code"]) == ("unknown_field", "unsupported_field")


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\udc00 a"', '"a\\ud83d"'])
def test_half_a_surrogate_is_no_text(served: Served, text: str) -> None:
    refusal(post(served, f'{{"model": "{MODEL}", "prompt": {text}}}'))
    refusal(post(served, f'{{"prompt": {text}}}', "/tokenize"))
    refusal(
        post(
            served,
            f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": {text}}}]}}',
            "/v1/chat/completions",
        )
    )


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_an_image_is_refused_where_the_model_takes_text_only(served: Served, path: str) -> None:
    part = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}'
    body = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": [{part}]}}]}}'
    error = post(served, body, path).json()["error"]
    assert (error["param"], error["code"]) == ("messages.0.content", "unsupported_value")
    assert f"part 0 is an image, and '{MODEL}' takes text only" in error["message"]


def test_strange_but_valid_text(served: Served, nasty_strings: tuple[str, ...]) -> None:
    for text in nasty_strings[:60]:
        ids = served.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert served.http.post("/detokenize", json={"tokens": ids}).json()["prompt"] == text
        if text:
            assert served.complete(text[:40], max_tokens=4).status_code == 200


def test_other_models_and_paths(served: Served) -> None:
    assert refusal(post(served, json.dumps({**OK, "model": "gpt-4"})), 404)["code"] == "model_not_found"
    refusal(post(served, json.dumps({**OK, "model": "a" * 10_000})), 404)
    assert "GET /openapi.json lists the paths" in refusal(served.http.get("/v1/nothing"), 404)["message"]
    refusal(served.http.get("/v1/completions"), 405)
    refusal(served.http.post("/health/live"), 405)
    for path in ("/health/live", "/health/ready"):  # as load balancers probe
        assert served.http.head(path).status_code == 200
    assert len(refusal(served.http.request("A" * 5_000, "/version"), 405)["message"]) < 100


@pytest.mark.parametrize("prompt", [[99_999], [-1], ""])
def test_a_prompt_that_is_none_has_a_code(served: Served, prompt: object) -> None:
    assert refusal(post(served, json.dumps({**OK, "prompt": prompt})))["code"] == "invalid_value"


def test_a_field_without_a_name_is_named(served: Served) -> None:
    assert refusal(post(served, json.dumps({**OK, "": 1})))["message"].startswith("'': ")


def test_prompts_that_do_not_fit(served: Served) -> None:
    assert refusal(served.complete("a" * 256))["code"] == "context_length_exceeded"
    full = served.complete("a" * 255, max_tokens=50).json()
    assert (full["usage"]["completion_tokens"], full["choices"][0]["finish_reason"]) == (1, "length")
    refusal(served.complete(["a"] * 65))
    refusal(served.complete("a", n=65))


def test_bodies_that_are_too_large(served: Served) -> None:
    assert refusal(post(served, b'{"prompt": "' + b"a" * (2 << 20) + b'"}'), 413)["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"a" * 100_000

    with suppress(httpx.WriteError, httpx.ReadError):  # the answer may come, and the end, while we still send
        refusal(served.http.post("/v1/completions", content=chunks()), 413)


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize(
    "head",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 5_000_000 + b"\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ],
)
def test_what_is_no_http(served: Served, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        with suppress(ConnectionError):  # the server may have closed it already
            connection.sendall(head)
            connection.shutdown(socket.SHUT_WR)
        assert b" 200 " not in read_all(connection)[:20]


def test_slow_headers_and_slow_bodies_are_given_up(served: Served) -> None:
    with ExitStack() as stack:
        silent, half, body = (
            stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=60)) for _ in range(3)
        )
        half.sendall(b"GET / HTTP/1.1\r\nhost:")
        body.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{")
        assert served.complete().status_code == 200  # meanwhile
        for connection, code in ((silent, "header_timeout"), (half, "header_timeout"), (body, "body_timeout")):
            said = read_all(connection)
            assert said.startswith(b"HTTP/1.1 408 ")
            assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == code


def test_ten_thousand_connections(served: Served) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 11_000:
        pytest.skip("this user may not open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (11_000, hard))
    front = psutil.Process(served.process.pid)
    before = front.memory_info().rss
    open_ones: list[socket.socket] = []
    try:
        for _ in range(10_000):
            connection = socket.socket()
            connection.settimeout(60)
            connection.connect(("127.0.0.1", served.port))
            open_ones.append(connection)
        said = read_all(open_ones[-1])
        assert said.startswith((b"HTTP/1.1 503 ", b"HTTP/1.1 408 ")), said[:100]
        other = socket.create_connection(("127.0.0.1", served.port), timeout=60, source_address=("127.0.0.2", 0))
        with other:  # one address cannot hold all connections
            other.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            assert read_all(other).startswith(b"HTTP/1.1 200 ")
        assert front.memory_info().rss - before < 300 * 2**20
    finally:
        for connection in open_ones:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_for(lambda: served.complete("abc").status_code == 200)


def test_keys_are_asked_for_and_rates_are_kept(serve: Start, tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsecret-one\n\n")
    guarded = serve(
        f"job.api_keys_file={file}", "job.rate_per_minute=5", env={"LAUNCHER_API_KEYS": "secret-two, three"}
    )
    with_key = {"authorization": "Bearer secret-one"}
    for wrong in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic secret-one"},
        {"authorization": "secret-one"},
    ):
        response = guarded.http.post("/v1/completions", json=OK, headers=wrong)
        assert refusal(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    codes = [guarded.http.post("/v1/completions", json=OK, headers=with_key).status_code for _ in range(6)]
    assert codes == [200] * 5 + [429]
    other = guarded.http.post("/v1/completions", json=OK, headers={"authorization": "Bearer three"})
    assert other.status_code == 200
    again = guarded.http.post("/tokenize", json={"prompt": "a"}, headers=with_key)
    assert int(again.headers["retry-after"]) > 1
    assert [guarded.http.get(path).status_code for path in ("/", "/metrics", "/health/ready", "/version")] == [200] * 4
    shown = guarded.output + (guarded.folder / "run.yaml").read_text() + guarded.http.get("/metrics").text
    assert "secret" not in shown.replace(str(file), "")
    for replica in guarded.replicas():
        assert "LAUNCHER_API_KEYS" not in replica.environ()
