"""Engines that die, hang, or cannot be built, under load; and the end of a server."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.helpers import wait_for
from tests.inference.server.conftest import MODEL, Served, Start, events, text_of

SLOW = ("job.echo_step_s=0.01", "job.result_cache_bytes=0")


def load(served: Served, number: int, ask: Callable[[int], httpx.Response]) -> list[Future[httpx.Response]]:
    pool = ThreadPoolExecutor(number)
    answers = [pool.submit(ask, each) for each in range(number)]
    wait_for(lambda: served.metric("num_requests_running") >= min(number, 4))
    pool.shutdown(wait=False)
    return answers


def prompt_of(number: int) -> str:
    return f"request {number} "


def expected(number: int, length: int) -> str:
    return (prompt_of(number) * 50)[:length]


def test_a_killed_replica_costs_no_client_a_repeatable_answer(serve: Start) -> None:
    served = serve("job.replicas=2", *SLOW)
    assert len(served.replicas()) == 2

    def ask(number: int) -> httpx.Response:
        return served.complete(prompt_of(number), max_tokens=150, stream=number % 2 == 0)

    answers = load(served, 12, ask)
    victim = served.replicas()[0]
    assert victim.environ()["OMP_NUM_THREADS"] == "1"
    time.sleep(0.3)
    victim.send_signal(signal.SIGKILL)
    for number, answer in enumerate(answers):
        response = answer.result()
        assert response.status_code == 200
        text = text_of(list(events(response))) if number % 2 == 0 else response.json()["choices"][0]["text"]
        assert text == expected(number, 150)
    wait_for(lambda: served.metric("engines_ready") == 2)
    assert served.metric("engine_restarts_total") == 1
    assert served.stop() == 0


def test_a_request_that_was_begun_does_not_queue_again(serve: Start) -> None:
    served = serve("job.queue_timeout_s=0.5", *SLOW)
    (answer,) = load(served, 1, lambda number: served.complete(prompt_of(number), max_tokens=100))
    time.sleep(1)
    served.replicas()[0].send_signal(signal.SIGKILL)  # another takes longer than that to come
    response = answer.result()
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == expected(0, 100)


def test_what_cannot_be_repeated_fails_and_says_so(serve: Start) -> None:
    served = serve(*SLOW)
    answers = load(served, 4, lambda number: served.complete(prompt_of(number), max_tokens=200, temperature=1))
    time.sleep(0.3)
    served.replicas()[0].send_signal(signal.SIGKILL)
    for answer in answers:
        response = answer.result()
        assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")
    assert not served.ready() or served.metric("engine_restarts_total") == 1
    again = wait_for(lambda: (r := served.complete()).status_code == 200 and r)
    assert again.json()["choices"][0]["text"] == "abcabcab"


def test_an_engine_that_hangs_is_not_ready_and_started_anew(serve: Start) -> None:
    served = serve("job.stall_s=1", *SLOW)
    answers = load(served, 4, lambda number: served.complete(prompt_of(number), max_tokens=100))
    served.replicas()[0].send_signal(signal.SIGSTOP)
    wait_for(lambda: served.http.get("/health/ready").json().get("why") == "no engine makes progress", seconds=10)
    assert served.http.get("/health/live").status_code == 200
    for number, answer in enumerate(answers):
        assert answer.result().json()["choices"][0]["text"] == expected(number, 100)
    assert served.ready()
    assert "has made no progress for" in served.output


def test_an_idle_engine_that_dies_comes_back(serve: Start) -> None:
    served = serve(*SLOW)
    for _ in range(2):
        served.replicas()[0].send_signal(signal.SIGKILL)
        wait_for(lambda: not served.ready())
        assert served.complete("waits", max_tokens=3).json()["choices"][0]["text"] == "wai"  # until there is one again


def test_engines_die_with_their_front(serve: Start) -> None:
    served = serve("job.replicas=2", *SLOW)
    assert served.stop(signal.SIGKILL) == -signal.SIGKILL  # and nothing is left behind


def test_an_engine_that_cannot_be_built_ends_the_run(serve: Start) -> None:
    served = serve("job.engine=paged", "model.weights=/nowhere", wait=False)
    assert served.process.wait(120) != 0
    assert "model.weights=/nowhere" in served.output
    assert "there is no such folder" in served.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_nothing(serve: Start, number: int) -> None:
    served = serve("job.replicas=2", "job.max_num_seqs=4", *SLOW)
    sent, lock = 0, threading.Lock()
    answers: list[Any] = []

    def client() -> None:
        nonlocal sent
        with httpx.Client(base_url=served.url, timeout=60) as http:
            while True:
                with lock:
                    sent += 1
                    mine = sent
                body = {"model": MODEL, "prompt": prompt_of(mine), "max_tokens": 40, "temperature": 0}
                try:
                    response = http.post("/v1/completions", json={**body, "stream": mine % 3 == 0})
                except httpx.ConnectError:
                    return  # the server listens no more: nothing was accepted
                with lock:
                    answers.append((mine, response))
                if response.status_code == 503:
                    return

    clients = [threading.Thread(target=client) for _ in range(12)]
    for each in clients:
        each.start()
    wait_for(lambda: len(answers) > 20)
    assert served.stop(number) == 0
    for each in clients:
        each.join()
    codes = {response.status_code for _, response in answers}
    assert codes <= {200, 503}
    for mine, response in answers:
        if response.status_code == 200:
            text = text_of(list(events(response))) if mine % 3 == 0 else response.json()["choices"][0]["text"]
            assert text == expected(mine, 40)
        else:
            assert response.json()["error"]["code"] == "draining"
            assert response.headers["retry-after"]
    line = json.loads((served.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["serve/generation_tokens"] == sum(response.status_code == 200 for _, response in answers) * 40


def test_what_does_not_end_in_time_is_reported(serve: Start) -> None:
    served = serve("job.echo_step_s=0.1", "job.drain_s=1")
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(lambda: served.complete("whole", max_tokens=200))
        stream = pool.submit(lambda: served.complete("stream", max_tokens=200, stream=True))
        wait_for(lambda: served.metric("num_requests_running") == 2)
        late = wait_for(lambda: socket.create_connection(("127.0.0.1", served.port)))
        assert served.stop() == 0
        late.close()
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "draining")
        chunks = list(events(stream.result()))
        assert chunks[0]["choices"][0]["text"] == "s"
        assert chunks[-1]["error"]["code"] == "draining"


def test_a_port_that_is_taken_meanwhile(serve: Start) -> None:
    first = serve(*SLOW)
    second = serve(*SLOW, f"job.port={first.port}", wait=False)
    assert second.process.wait(60) != 0
    assert f"job.port={first.port}" in second.output
    assert "set job.port to another port" in second.output


def test_before_it_is_ready_it_says_so(serve: Start) -> None:
    served = serve(*SLOW, wait=False)

    def answer() -> httpx.Response | None:
        try:
            return served.http.get("/health/ready")
        except httpx.TransportError:
            return None

    first = wait_for(answer)
    if first.status_code == 503:  # the engine is started after the address is there
        assert first.json()["why"].startswith("the server is starting")
        assert first.headers["retry-after"]
    wait_for(served.ready)
