"""vLLM behind our interface, here a program that only talks like it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.config.compose import compose
from launcher.config.inference import EngineLimits
from launcher.config.job.generate import Generate
from launcher.config.sampling import SamplingParams
from launcher.errors import JobError
from launcher.inference.engine.base import EngineRequest, InvalidRequest
from launcher.inference.engine.vllm_engine import VllmEngine, VllmServer, request_body
from tests.helpers import wait_for
from tests.inference.models import finish, tokens

_PROGRAM = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
words = sys.argv
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *rest): pass
    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.answer(200, {})
    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["content-length"])))
        # as vLLM does where VLLM_API_KEY is set
        if self.headers.get("authorization") != "Bearer " + os.environ["VLLM_API_KEY"]: return self.answer(401, {})
        first, count = given["prompt"][0], given["max_tokens"]
        if first == 1: return self.answer(400, {"error": {"message": "not this one"}})
        if first == 2: os._exit(7)
        if first == 3: time.sleep(60)
        ids = [first + number for number in range(count)]
        tops = [{f"token_id:{number}": -1.0, "token_id:0": -2.0} for number in ids]
        logs = {"token_logprobs": [-1.0] * count, "top_logprobs": tops} if given["logprobs"] else None
        self.answer(200, {"choices": [{"token_ids": ids, "finish_reason": "length", "logprobs": logs}]})
ThreadingHTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""
WAY = SamplingParams(max_tokens=3)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    (tmp_path / "server.py").write_text(_PROGRAM)
    script = tmp_path / "python"
    command = shlex.join([sys.executable, str(tmp_path / "server.py")])
    script.write_text(f'#!/bin/sh\n[ "$1" = -m ] || exit 0\nexec {command} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def engine(python: Path) -> Iterator[VllmEngine]:
    run = compose(["job=generate", "job.engine=vllm", f"job.vllm_python={python}", "model=gpt2_tiny"]).run
    assert isinstance(run.job, Generate)
    server = VllmServer(run, run.job, name="m")
    server.start("/weights")
    made = VllmEngine(server, name="m", limits=EngineLimits(max_num_seqs=2), max_model_len=64, vocab_size=100)
    yield made
    made.close()


def test_sequences_go_there_and_come_back(engine: VllmEngine) -> None:
    asked = [EngineRequest(id=str(number), prompt=(number, 5), sampling=WAY) for number in range(10, 16)]
    found = finish(engine, asked)
    assert [tokens(found[request.id]) for request in asked] == [[n, n + 1, n + 2] for n in range(10, 16)]
    assert {updates[-1].finish_reason for updates in found.values()} == {"length"}
    output = finish(engine, [EngineRequest(id="x", prompt=(20,), sampling=SamplingParams(max_tokens=1, logprobs=2))])[
        "x"
    ][0].tokens[0]
    assert (output.logprob, output.top) == (-1.0, ((20, -1.0), (0, -2.0)))
    assert engine.stats().generated_tokens_total == 19


def test_what_it_refuses_is_an_error_of_that_request(engine: VllmEngine) -> None:
    bad, good = (EngineRequest(id=str(first), prompt=(first,), sampling=WAY) for first in (1, 10))
    found = finish(engine, [bad, good])
    assert found["1"][-1].finish_reason == "error"
    assert "400" in found["1"][-1].error
    assert "not this one" in found["1"][-1].error
    assert tokens(found["10"]) == [10, 11, 12]
    with pytest.raises(InvalidRequest, match="does not have it"):
        engine.add(EngineRequest(id="b", prompt=(5,), sampling=SamplingParams(max_tokens=3, num_beams=2)))


def test_a_cancelled_request_makes_room(engine: VllmEngine) -> None:
    for name in ("a", "b"):
        engine.add(EngineRequest(id=name, prompt=(3,), sampling=WAY))
    engine.step()
    assert engine.stats().running == 2
    engine.cancel("a")
    engine.cancel("b")
    assert [update.finish_reason for update in engine.step()] == ["cancelled"] * 2
    assert tokens(finish(engine, [EngineRequest(id="a", prompt=(10,), sampling=WAY)])["a"]) == [10, 11, 12]


def test_when_it_dies_no_request_is_blamed_and_the_run_fails(engine: VllmEngine) -> None:
    engine.add(EngineRequest(id="a", prompt=(2,), sampling=WAY))

    def go_on() -> None:
        for _ in range(400):
            assert not engine.step()

    with pytest.raises(JobError, match="vLLM ended with exit code 7"):
        go_on()


def _is_server(process: psutil.Process) -> bool:
    try:
        return "--served-model-name" in process.cmdline()
    except psutil.Error:  # the remains of another test's child
        return False


def test_it_ends_with_the_engine(engine: VllmEngine) -> None:
    (child,) = [each for each in psutil.Process().children() if _is_server(each)]
    engine.close()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, seconds=20)


def test_every_way_to_sample_is_sent() -> None:
    way = SamplingParams(
        max_tokens=3, temperature=0.5, top_k=4, seed=1, logit_bias=((7, 2.0),), stop_token_ids=(9,), ignore_eos=True
    )
    body = request_body(EngineRequest(id="x", prompt=(1, 2), sampling=way), model="m")
    wanted = {"temperature": 0.5, "top_k": 4, "seed": 1, "logit_bias": {"7": 2.0}, "stop_token_ids": [9]}
    assert body.items() >= {**wanted, "ignore_eos": True, "prompt": [1, 2], "logprobs": None}.items()
