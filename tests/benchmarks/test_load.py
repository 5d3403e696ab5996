"""The load generator, against servers that misbehave on purpose."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Coroutine, Iterator
from itertools import islice
from typing import Any

import pytest

from launcher.benchmarks.load_client import LoadTarget, RequestOutcome
from launcher.benchmarks.load_generator import (
    LoadResult,
    Slo,
    closed_loop,
    open_loop,
    percentile,
    poisson_arrivals,
    random_requests,
    summarize_load,
    tokens_between,
)
from launcher.config.benchmark.serving import (
    LoadRequest,
    parse_length_distribution,
    parse_server_address,
    read_trace,
)

Handler = Callable[[dict[str, Any], asyncio.StreamWriter], Coroutine[Any, Any, None]]


class Fake:
    """A server of completions that does what a handler says."""

    def __init__(self, handler: Handler) -> None:
        self.handler, self.bodies, self.connections = handler, [], 0
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        async def serve() -> None:
            self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]
            started.set()

        self._loop.create_task(serve())
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        assert started.wait(10)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].split("\r\n")[0])
                self.bodies.append(json.loads(await reader.readexactly(length)))
                await self.handler(self.bodies[-1], writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    def target(self, **options: Any) -> LoadTarget:
        return LoadTarget(address=parse_server_address(f"http://127.0.0.1:{self.port}"), model="m", **options)

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.01)  # for transports to say that they are closed

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def fake() -> Iterator[Callable[[Handler], Fake]]:
    started: list[Fake] = []

    def start(handler: Handler) -> Fake:
        started.append(Fake(handler))
        return started[-1]

    yield start
    for server in started:
        server.close()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(value: Any) -> bytes:
    return chunk(b"data: " + json.dumps(value).encode() + b"\n\n")


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def stream(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Answer as OpenAI does: pieces, a reason to finish, usage, and the word that ends a stream."""
    writer.write(HEAD + chunk(b": keep-alive\n\n"))
    for number in range(body["max_tokens"]):
        writer.write(event({"choices": [{"text": f"{number} ", "finish_reason": None}]}))
        await asyncio.sleep(0.005)
    writer.write(event({"choices": [{"text": "", "finish_reason": "length"}]}))
    writer.write(event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2 * body["max_tokens"]}}))
    writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def calls(count: int, **fields: Any) -> list[LoadRequest]:
    return [LoadRequest({"prompt": "a b c", "max_tokens": 4, **fields})] * count


def test_a_closed_loop_keeps_the_configured_number_of_calls_in_flight(fake) -> None:
    under_way = most = 0

    async def counting(body, writer) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await stream(body, writer)
        under_way -= 1

    server = fake(counting)
    load = closed_loop(
        server.target(extra_body={"top_k": 1, "stream_options": None}, keep_text=True), calls(9), max_concurrency=3
    )
    assert (most, server.connections, len(load.outcomes)) == (3, 3, 9)
    sent = {"model": "m", "stream": True, "temperature": 0, "top_k": 1, "prompt": "a b c", "max_tokens": 4}
    assert server.bodies[0] == sent
    for outcome in load.outcomes:
        assert (outcome.error, outcome.text, outcome.finish) == ("", "0 1 2 3 ", "length")
        assert (outcome.tokens, outcome.prompt_tokens, len(outcome.chunks_s)) == (8, 3, 4)
        assert 0 <= outcome.due_s <= outcome.sent_s <= outcome.chunks_s[0] <= outcome.chunks_s[-1] <= outcome.end_s


def test_the_end_of_the_time_breaks_off_what_is_under_way_and_its_tokens_count(fake) -> None:
    server = fake(stream)
    load = closed_loop(server.target(), iter(calls(1)[0] for _ in iter(int, 1)), max_concurrency=2, seconds=0.5)
    assert sum(outcome.error == "unfinished" for outcome in load.outcomes) == 2
    endless = closed_loop(server.target(), calls(2, max_tokens=10_000), max_concurrency=2, seconds=0.3)
    assert [outcome.error for outcome in endless.outcomes] == ["unfinished"] * 2
    found = summarize_load(endless, slo=Slo())
    assert (found["errors"], found["unfinished"], found["requests"]) == (0, 2, 0)
    num_chunks = sum(len(outcome.chunks_s) for outcome in endless.outcomes)
    assert num_chunks > 4
    assert found["tokens_per_s"] * endless.elapsed_s == pytest.approx(num_chunks)


def test_in_an_open_loop_a_stall_of_the_server_counts_from_when_calls_were_due(fake) -> None:
    lock = asyncio.Lock()

    async def one_after_the_other(body, writer) -> None:
        async with lock:
            await asyncio.sleep(0.1)
            await stream(body, writer)

    server = fake(one_after_the_other)
    due = [LoadRequest({"prompt": "a", "max_tokens": 1}, at_s=0.01 * number) for number in range(8)]
    load = open_loop(server.target(), due)
    assert [round(outcome.due_s, 6) for outcome in load.outcomes] == [call.at_s for call in due]
    assert server.connections == 8  # none waits for another one's answer before it is sent
    waits = [outcome.ttft_s for outcome in load.outcomes]
    assert waits == sorted(waits)
    assert waits[-1] > 7 * 0.1 - 0.07


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\n\r\n{}", "429"),
        (HEAD + event({"error": {"message": "broken"}}), "frame"),
        (HEAD + chunk(b"data: {broken\n\n"), "frame"),
        (HEAD + event({"choices": [{"text": "a"}]}) + b"0\r\n\r\n", "cut"),
        (HEAD + event({"choices": [{"text": "a"}]}) + b"CLOSE", "cut"),
        (HEAD + event({"choices": [{"text": "a"}]}) + b"STALL", "timeout"),
        (b"CLOSE", "connect"),
    ],
)
def test_errors_are_counted_by_kind_and_the_next_call_goes_on(fake, answer, kind) -> None:
    async def badly(body, writer) -> None:
        if body["prompt"] == "good":
            await stream(body, writer)
            return
        writer.write(answer.removesuffix(b"CLOSE").removesuffix(b"STALL"))
        if answer.endswith(b"CLOSE"):
            await writer.drain()
            writer.close()
        elif answer.endswith(b"STALL"):
            await asyncio.sleep(60)

    bad, good = calls(1, prompt="bad"), calls(1, prompt="good")
    load = closed_loop(fake(badly).target(timeout_s=1.0), bad + good, max_concurrency=1)
    assert [outcome.error for outcome in load.outcomes] == [kind, ""]
    found = summarize_load(load, slo=Slo())
    assert (found[f"error/{kind}"], found["errors"], found["requests"]) == (1, 1, 1)


def test_an_answer_that_is_no_stream_counts_too(fake) -> None:
    async def whole(body, writer) -> None:
        answer = {"choices": [{"text": "one two", "finish_reason": "length"}], "usage": {"completion_tokens": 2}}
        data = json.dumps(answer, indent=1).encode()
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    (outcome,) = closed_loop(fake(whole).target(), calls(1), max_concurrency=1).outcomes
    assert (outcome.error, outcome.tokens, len(outcome.chunks_s)) == ("", 2, 1)


def test_no_server_there() -> None:
    target = LoadTarget(address=parse_server_address("http://127.0.0.1:9"), model="m")
    (outcome,) = closed_loop(target, calls(1), max_concurrency=1).outcomes
    assert outcome.error == "connect"


def test_the_same_seed_gives_the_same_load() -> None:
    lengths = {
        "input_len": parse_length_distribution("lognormal:20:1.0:90"),
        "output_len": parse_length_distribution("3-9"),
    }
    one, two, other = (list(islice(random_requests(seed=seed, **lengths), 200)) for seed in (1, 1, 2))
    assert one == two != other
    words = [len(call.fields["prompt"].split()) for call in one]
    assert max(words) <= 90
    assert 12 < percentile(words, 50) < 32
    assert {call.fields["max_tokens"] for call in one} == set(range(3, 10))
    times = list(islice(poisson_arrivals(seed=1, request_rate=50.0), 5000))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("text", ["", "0", "9-3", "0-3", "x", "lognormal:0:1:5", "lognormal:4:1", "-1"])
def test_what_is_no_distribution_of_lengths_is_refused(text) -> None:
    with pytest.raises(ValueError, match="length"):
        parse_length_distribution(text)


def test_a_trace_is_read_and_its_bad_lines_named(tmp_path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 2, "at_s": 1.5}\n\n{"messages": []}\n')
    assert read_trace(path) == [LoadRequest({"prompt": "a", "max_tokens": 2}, 1.5), LoadRequest({"messages": []}, 0.0)]
    for line, message in (
        ("{}", "line 1 needs"),
        ("[", "line 1 is not a request"),
        ("5", "line 1 is not a request"),
        ("", "is empty"),
    ):
        path.write_text(line)
        with pytest.raises(ValueError, match=message):
            read_trace(path)


@pytest.mark.parametrize("url", ["https://x", "x:1", "http://", "http://x/?a=1", "http://x/#a"])
def test_what_is_no_address_is_refused(url) -> None:
    with pytest.raises(ValueError, match="address"):
        parse_server_address(url)


@pytest.mark.parametrize("url", ["http://me:pw@x:1", "http://me@x:1"])
def test_a_login_in_an_address_is_refused_because_it_would_be_stored(url) -> None:
    with pytest.raises(ValueError, match=r"^has a login, and run\.yaml is written to disk: a server takes keys"):
        parse_server_address(url)


def outcome(due_s: float, chunks_s: list[float], tokens: int, error: str = "") -> RequestOutcome:
    return RequestOutcome(
        0, due_s=due_s, sent_s=due_s + 0.5, chunks_s=chunks_s, end_s=chunks_s[-1], tokens=tokens, error=error
    )


def test_figures_of_known_outcomes() -> None:
    outcomes = [outcome(0, [1, 2, 4], 3), outcome(1, [4, 5], 4), outcome(2, [3.0], 1, error="cut")]
    found = summarize_load(LoadResult(outcomes=outcomes, elapsed_s=5.0, cpu_s=0.1), slo=Slo(ttft_s=2.0, tpot_s=1.5))
    assert (found["requests"], found["errors"], found["error/cut"]) == (2, 1, 1)
    assert (found["ttft_p50_s"], found["ttft_mean_s"], found["e2el_p99_s"]) == (2.0, 2.0, 4.0)
    assert found["itl_p50_s"] == 1.0
    assert found["tpot_mean_s"] == pytest.approx((1.5 + 1 / 3) / 2)
    assert found["goodput_per_s"] == 1 / 5
    assert found["client_cpu_share"] == pytest.approx(0.02)
    assert found["send_delay_p99_s"] == 0.5


def test_tokens_between_two_times_count_pieces_at_their_worth() -> None:
    outcomes = [outcome(0, [1, 2], 6), outcome(0, [3, 9], 99, error="unfinished")]
    assert tokens_between(outcomes, 0, 10) == 6 + 2 * 3
    assert tokens_between(outcomes, 1.5, 5) == 3 + 3
    assert tokens_between([outcomes[1]], 0, 10) == 2


def test_percentiles_are_those_of_numpy() -> None:
    import numpy

    random_ = random.Random(0)
    for count in (1, 2, 5, 100):
        values = [random_.random() for _ in range(count)]
        for share in (0, 50, 90, 99, 100):
            assert percentile(values, share) == pytest.approx(float(numpy.percentile(values, share)))
