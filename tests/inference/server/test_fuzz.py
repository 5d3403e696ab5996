"""Drawn bodies, large ones among them: fuzz_bodies.py in short."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import fuzz_bodies
import psutil
import pytest
from bodies import requests
from hypothesis import HealthCheck, Phase, example, given, settings

from tests.inference.server.conftest import MODEL as SERVED
from tests.inference.server.conftest import Served
from tests.inference.server.loop import MODEL, client, post

CONTROL = {"model": MODEL, "prompt": "control", "max_tokens": 20, "temperature": 0}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as running:
        yield running


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(request_=requests(MODEL))
@example(request_=("/v1/completions", b'{"model":"tiny","prompt":[' + b"0," * 1_000_000 + b'"a"]}'))
def test_no_body_is_the_servers_fault(runner: asyncio.Runner, request_: tuple[str, bytes]) -> None:
    async def ask() -> None:
        async with client() as to:
            answer = await post(to, *request_)
            control = await post(to, "/v1/completions", CONTROL)
        assert answer.status_code in (200, 400, 404), answer.text
        assert '"server_error"' not in answer.text
        assert control.json()["choices"][0]["text"] == "controlcontrolcontro"

    runner.run(ask())


def test_the_command_finds_nothing_wrong_with_a_server(served: Served) -> None:
    found, until = fuzz_bodies.Findings(), time.monotonic() + 2
    work = [
        threading.Thread(target=fuzz_bodies.fuzz, args=(served.url, SERVED, 0, found, until)),
        threading.Thread(target=fuzz_bodies.control, args=(served.url, SERVED, found, until)),
        threading.Thread(target=fuzz_bodies.probe, args=(served.url, psutil.Process(served.process.pid), found, until)),
    ]
    for each in work:
        each.start()
    for each in work:
        each.join()
    assert not found.wrong
    assert found.statuses
    assert found.num_controls
    assert len(found.memory) > 2
    findings = fuzz_bodies.Findings()
    findings.memory = [1 << 20] * 9
    assert not list(fuzz_bodies.verdict(findings))
    findings.wrong, findings.stalls, findings.memory[-1] = ["/tokenize: 500"], [0.2], 1 << 30
    assert len(list(fuzz_bodies.verdict(findings))) == 3
