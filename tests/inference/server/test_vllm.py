"""``job.engine=vllm``: the same address over a program of its own, here one that only talks like vLLM."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from launcher.config import inference
from launcher.config.compose import compose
from launcher.protocol.rundir import RunDir
from tests.helpers import wait_for
from tests.inference.server.conftest import Served, Start, fake_vllm
from tests.ports import free_port
from tests.processes import marked


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An interpreter whose vLLM is ours."""
    return fake_vllm(tmp_path)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    return folder


def words(environment: Path, weights: Path) -> tuple[str, ...]:
    return ("job.engine=vllm", f"job.vllm_python={environment}", f"model.weights={weights}", "job.drain_s=5")


def vllm_of(served: Served) -> psutil.Process:
    (found,) = [each for each in marked(served.mark) if "--served-model-name" in each.cmdline()]
    return found


def test_requests_are_handed_on_and_answers_back(serve: Start, environment: Path, weights: Path) -> None:
    served = serve(*words(environment, weights), env={inference.API_KEYS_VARIABLE: "k"})
    shown = {"authorization": "Bearer k"}
    answer = served.http.get("/v1/models?x=1", headers=shown).json()
    assert answer["path"] == "/v1/models?x=1"
    given = answer["words"]
    assert given[given.index("--model") + 1] == str(weights)
    assert given[given.index("--served-model-name") + 1] == "gpt2_tiny"
    assert given[given.index("--host") + 1] == "127.0.0.1"
    assert inference.API_KEYS_VARIABLE not in answer["names"]
    assert "PYTHONPATH" not in answer["names"]
    stream = served.http.post("/v1/completions", json={}, headers=shown)
    assert stream.headers["content-type"] == "text/event-stream"
    assert stream.text == "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert served.http.post("/v1/completions", json={}).status_code == 401
    past_us = f"http://127.0.0.1:{given[given.index('--port') + 1]}/v1/models"
    assert httpx.get(past_us).status_code == 401, "another user of this machine"
    assert httpx.get(past_us, headers=shown).status_code == 401
    assert served.stop() == 0


def test_one_that_dies_is_started_anew(serve: Start, environment: Path, weights: Path) -> None:
    served = serve(*words(environment, weights))
    answer = served.http.post("/v1/completions", json={"die": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_failed")
    wait_for(lambda: not served.ready())
    wait_for(served.ready)
    vllm_of(served).send_signal(signal.SIGKILL)
    wait_for(lambda: "SIGKILL" in served.output or "exit code -9" in served.output)
    wait_for(served.ready)
    served.process.kill()  # what is below goes with it: the fixture would find it
    wait_for(lambda: not [each for each in marked(served.mark) if "--served-model-name" in each.cmdline()])


def test_one_that_never_answers_ends_the_run(serve: Start, environment: Path, weights: Path) -> None:
    (environment.parent / "server.py").write_text("import sys\nprint('no such model')\nsys.exit(3)\n")
    served = serve(*words(environment, weights), wait=False)
    assert served.process.wait(60) != 0
    assert "no such model" in served.output
    assert "vLLM ended with exit code 3" in served.output


def test_answers_are_finished_after_sigterm(serve: Start, environment: Path, weights: Path) -> None:
    import threading

    served = serve(*words(environment, weights))
    answers: list[Any] = []
    body = {"sleep": 0.3}
    asking = threading.Thread(target=lambda: answers.append(served.http.post("/v1/completions", json=body)))
    asking.start()
    wait_for(lambda: vllm_of(served).net_connections())
    assert served.stop() == 0
    asking.join()
    assert answers[0].text.endswith("data: [DONE]\n\n")


def test_what_is_missing_is_refused_with_what_to_type(environment: Path, plan_of: Any, tmp_path: Path) -> None:
    base = ("job=serve", "backend.ranks=1", "job.engine=vllm", f"job.port={free_port()}")

    def said(*more: str) -> str:
        run = compose([*base, *more]).run
        return "\n".join(map(str, run.job.validate_machine(run, RunDir(tmp_path))))

    with pytest.raises(Exception, match=r"pip install vllm"):
        plan_of(*base)
    with pytest.raises(Exception, match=r"model\.weights=random"):
        plan_of(*base, f"job.vllm_python={environment}")
    assert said(f"job.vllm_python={environment}") == ""
    assert "is not an executable file" in said("job.vllm_python=/nowhere/python")
    assert "its environment has no vLLM" in said(f"job.vllm_python={sys.executable}")
    environment.write_text("#!/bin/sh\nexit 1\n")
    assert "its environment has no vLLM" in said(f"job.vllm_python={environment}")
