"""Streams byte by byte, results that are kept, and clients that go away."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.helpers import wait_for
from tests.inference.server.conftest import MODEL, Served, Start, events, text_of


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server whose steps take a while."""
    from tests.inference.server.conftest import _starter

    starter = _starter(lambda: tmp_path_factory.mktemp("slow"))
    yield next(starter)("job.echo_step_s=0.02", "job.max_num_seqs=8", "job.max_queue=64")
    next(starter, None)


def raw(port: int, body: dict[str, Any]) -> socket.socket:
    """Send a request as bytes; return the connection."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(payload)}\r\n\r\n"
    connection.sendall(head.encode() + payload)
    return connection


def test_the_bytes_of_a_stream(served: Served) -> None:
    body = {"model": MODEL, "prompt": "é!", "max_tokens": 3, "temperature": 0, "stream": True}
    response = served.http.post("/v1/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    blocks = response.content.split(b"\n\n")
    assert blocks[-2:] == [b"data: [DONE]", b""]
    assert all(block.startswith(b"data: {") and b"\n" not in block for block in blocks[:-2])
    chunks = [json.loads(block[6:]) for block in blocks[:-2]]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["é", "!", ""]  # not half an é
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_nothing_of_a_stop_string_is_sent(served: Served) -> None:
    chunks = list(events(served.complete("abcdef", max_tokens=50, stop="cde", stream=True)))
    assert [c["text"] for chunk in chunks for c in chunk["choices"]] == ["a", "b", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_request_that_is_refused_before_its_first_event_has_a_status(served: Served) -> None:
    response = served.complete("a" * 300, stream=True)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_kept_results_stream_the_same(served: Served) -> None:
    ask = {"prompt": "kept wörds", "max_tokens": 25, "temperature": 0, "logprobs": 1}
    first, second, whole = (
        served.complete(**ask, stream=True),
        served.complete(**ask, stream=True),
        served.complete(**ask),
    )
    assert [each.headers["x-cache"] for each in (first, second, whole)] == ["miss", "hit", "hit"]

    def contents(response: Any) -> list[Any]:
        return [chunk["choices"] for chunk in events(response)]

    assert contents(first) == contents(second)
    assert whole.json()["choices"][0]["text"] == text_of(list(events(first)))


def test_what_is_kept_and_what_is_not(served: Served) -> None:
    def how(**more: Any) -> str:
        return served.complete("what is kept", **more).headers["x-cache"]

    assert [how(), how(), how(max_tokens=9), how(stop="x"), how(stop=["x"])] == ["miss", "hit", "miss", "miss", "hit"]
    assert [how(temperature=1), how(temperature=1)] == ["bypass", "bypass"]
    assert [how(temperature=1, seed=1), how(temperature=1, seed=2), how(temperature=1, seed=1)] == [
        "miss",
        "miss",
        "hit",
    ]
    assert [how(n=2), how(priority=1)] == ["hit", "hit"]


def test_a_stopped_text_is_kept_with_its_end(served: Served) -> None:
    first, second = (served.complete("uvwxyz", max_tokens=40, stop="xy") for _ in range(2))
    assert second.headers["x-cache"] == "hit"
    assert first.json()["choices"] == second.json()["choices"]
    assert second.json()["choices"][0]["text"] == "uvw"


def test_equal_requests_at_once_are_computed_once(slow: Served) -> None:
    before, kept_before = slow.metric("generation_tokens_total"), slow.metric("result_cache_hits_total")
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: slow.complete("all at once", max_tokens=120).json(), range(12)))
    assert {answer["choices"][0]["text"] for answer in answers} == {("all at once" * 11)[:120]}
    assert slow.metric("generation_tokens_total") - before == 120
    shared, kept = slow.metric("result_cache_shared_total"), slow.metric("result_cache_hits_total")
    assert shared > 0
    assert shared + kept - kept_before == 11  # who comes late finds it kept


@pytest.mark.parametrize(("stream", "choices"), [(False, 1), (True, 1), (True, 3)])
def test_a_client_that_vanishes_is_let_go_of(slow: Served, *, stream: bool, choices: int) -> None:
    wait_for(lambda: slow.metric("num_requests_running") == 0)
    gone = slow.metric("request_failure_total", reason="abandoned")
    body = {"model": MODEL, "prompt": "gone", "max_tokens": 250, "stream": stream, "n": choices, "temperature": 1}
    connection = raw(slow.port, body)
    wait_for(lambda: slow.metric("num_requests_running") == choices)
    connection.close()
    wait_for(lambda: slow.metric("num_requests_running") == 0, seconds=4)  # five seconds were left
    assert slow.metric("request_failure_total", reason="abandoned") == gone + choices


def test_one_of_two_readers_may_vanish(slow: Served) -> None:
    body = {"model": MODEL, "prompt": "two readers", "max_tokens": 100, "temperature": 0}
    first = raw(slow.port, body)
    wait_for(lambda: slow.metric("num_requests_running") == 1)
    answers: list[Any] = []
    reader = threading.Thread(target=lambda: answers.append(slow.complete("two readers", max_tokens=100)))
    reader.start()
    time.sleep(0.2)
    first.close()
    reader.join()
    assert answers[0].json()["choices"][0]["text"] == ("two readers" * 10)[:100]
    assert answers[0].headers["x-cache"] == "hit"


def test_the_queue_is_limited_and_says_when_to_come_back(serve: Start) -> None:
    tight = serve("job.echo_step_s=0.02", "job.max_num_seqs=1", "job.max_queue=2", "job.result_cache_bytes=0")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: tight.complete(f"queue {n}", max_tokens=50), range(8)))
    done, full = ([each for each in answers if each.status_code == code] for code in (200, 429))
    assert len(done) + len(full) == 8
    assert len(done) >= 3
    assert full
    for refused in full:
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
    assert tight.metric("requests_rejected_total", reason="queue_full") == len(full)
    ended: list[str] = []

    def ask(name: str, priority: int) -> None:
        assert tight.complete(name, max_tokens=40, priority=priority).status_code == 200
        ended.append(name)

    with ThreadPoolExecutor(3) as pool:
        pool.submit(ask, "first", 0)
        wait_for(lambda: tight.metric("num_requests_running") == 1)
        pool.submit(ask, "low", 0)
        wait_for(lambda: tight.metric("num_requests_waiting") == 1)
        pool.submit(ask, "high", 1)
    assert ended == ["first", "high", "low"]


def test_deadlines_are_kept(serve: Start) -> None:
    late = serve(
        "job.echo_step_s=0.05",
        "job.max_num_seqs=1",
        "job.queue_timeout_s=0.5",
        "job.request_timeout_s=2",
    )
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: late.complete("whole", max_tokens=200))
        wait_for(lambda: late.metric("num_requests_running") == 1)
        second = late.complete("queued", max_tokens=2)
        assert (second.status_code, second.json()["error"]["code"]) == (408, "queue_timeout")
        assert (first.result().status_code, first.result().json()["error"]["code"]) == (504, "request_timeout")
    streamed = late.complete("streamed", max_tokens=200, stream=True)
    assert streamed.status_code == 200
    last = list(events(streamed))[-1]
    assert last["error"]["code"] == "request_timeout"
    assert late.complete("fine", max_tokens=2).status_code == 200


def test_a_deadline_is_kept_although_the_engine_is_in_a_long_step(serve: Start) -> None:
    stuck = serve("job.echo_step_s=25", "job.request_timeout_s=1", "job.stall_s=60")
    started = time.monotonic()
    late = stuck.complete("whole", max_tokens=3)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
    assert time.monotonic() - started < 20, "reported by the engine when its step had ended"


def test_a_stream_that_waits_says_that_it_is_alive(serve: Start) -> None:
    waiting = serve("job.echo_step_s=6", "job.max_num_seqs=1")
    response = waiting.complete("slow", max_tokens=1, stream=True)
    assert response.text.startswith(": waiting\n\n")
    assert text_of(list(events(response))) == "s"
