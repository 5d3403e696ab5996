"""What a pod would start, started here: the ConfigMap's run, with the containers' commands, variables and probes.

Paths of the container are folders below the test's; everything else is as in the manifests.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from launcher.utils.files import read_json
from tests.conftest import Start
from tests.deploy.conftest import Render, manifests_of
from tests.deploy.containers import Container
from tests.helpers import wait_for
from tests.inference.server.conftest import chat_tokenizer, events, fake_vllm
from tests.ports import free_port

TINY = (
    *("model=gpt2_tiny", "model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=2"),
    *("model.vocab_size=257", "job.tokenizer=bytes"),
)
SHAPES = ",".join(["[8,100]"] * 200)
"""Of a warm-up that a probe sees."""


@dataclass(frozen=True)
class Pod:
    """The pod's specification, and its container's folders here."""

    spec: dict[str, Any]
    container: Container

    @property
    def server(self) -> dict[str, Any]:
        """The container of the server."""
        (found,) = self.spec["containers"]
        return dict(found)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server['ports'][0]['containerPort']}"

    def probe(self, name: str) -> tuple[int, str]:
        """Ask as the kubelet does; return status and text, 0 where nothing listens."""
        asked = self.server[name]["httpGet"]
        (port,) = (each["containerPort"] for each in self.server["ports"] if each["name"] == asked["port"])
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}{asked['path']}", timeout=10)
        except httpx.TransportError:
            return 0, ""
        return answer.status_code, answer.text


@pytest.fixture
def make_pod(rendered: Render, tmp_path: Path) -> Callable[..., Pod]:
    """Return what renders a pod and mounts its ConfigMap."""

    def make(*words: str) -> Pod:
        own = (f"job.port={free_port()}", "deploy.cpus=1", f"deploy.python={sys.executable}")
        found = manifests_of(rendered(*own, *words)[2])
        spec = found["Deployment"]["spec"]["template"]["spec"]
        mounts = spec["containers"][0]["volumeMounts"]
        folders = [each["mountPath"] for each in mounts if "subPath" not in each and each["name"] not in ("tmp", "shm")]
        (snapshot,) = (each["mountPath"] for each in mounts if each["name"] == "snapshot")
        container = Container(tmp_path / "root", (*folders, str(Path(snapshot).parent)))
        container.write_run(snapshot, found["ConfigMap"]["data"]["run.yaml"])
        return Pod(spec, container)

    return make


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"]}


def test_it_is_ready_once_warm_serves_and_drains(make_pod: Callable[..., Pod], preloading: Start) -> None:
    pod = make_pod(*TINY, f"job.warm_up=[{SHAPES}]", "deploy.pre_stop_s=1", "job.drain_s=30")
    server, seen = pod.server, []

    def is_warming_up() -> bool:
        ready, live = (pod.probe(f"{each}Probe")[0] for each in ("readiness", "liveness"))
        seen.append((ready, live, *pod.probe("startupProbe")))  # asked last: it was warming up before, too
        return 0 not in (ready, live) and "(warm up)" in seen[-1][3]

    started = pod.container.running(
        server["command"], variables(server), cwd=server["workingDir"], start_process=preloading
    )
    with started as process:
        wait_for(is_warming_up, process=process, shown=lambda: f"{seen}\n{pod.container.log}")
        assert seen[-1][:3] == (503, 200, 503)  # live: a long start is no reason to start again
        wait_for(lambda: pod.probe("startupProbe")[0] == 200, process=process, shown=lambda: pod.container.log)
        assert pod.probe("readinessProbe")[0] == 200
        body = {"model": "gpt2_tiny", "prompt": "abc", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{pod.url}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 8, answer.text

        # its end: endpoints are removed, preStop waits while the last requests arrive, then SIGTERM
        time.sleep(server["lifecycle"]["preStop"]["sleep"]["seconds"])
        assert httpx.post(f"{pod.url}/v1/completions", json=body, timeout=60).is_success
        long = {**body, "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{pod.url}/v1/completions", json=long, timeout=60) as stream:
            lines = stream.iter_text()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = "".join(lines)
        got = list(events(httpx.Response(200, text=first + rest)))
        assert got[-1]["choices"][0]["finish_reason"] == "length", "it was finished, not cut"
        assert process.wait(pod.spec["terminationGracePeriodSeconds"]) == 0
    assert "draining: 1 requests are open" in pod.container.log
    (result,) = (pod.container.root / "runs").glob("*/*/result.json")
    assert read_json(result)["status"] == "completed"


def test_vllm_serves_what_the_init_container_fetched(
    make_pod: Callable[..., Pod], preloading: Start, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    (store / "nested").mkdir(parents=True)
    (store / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (store / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    chat_tokenizer(store)
    (store / "nested/more.json").write_text("{}")
    pod = make_pod(
        *("model=smollm2_135m", "job.engine=vllm", f"job.vllm_python={fake_vllm(tmp_path)}", "job.drain_s=5"),
        *("deploy.vllm_image=registry.example/launcher-vllm:1", "deploy.memory=8Gi"),
        *("deploy.model_from=object_store", f"deploy.model_source=file://{store}"),
    )
    (init,) = pod.spec["initContainers"]
    Path(pod.container.here("/models")).mkdir()
    fetched = subprocess.run([pod.container.here(word) for word in init["command"]], capture_output=True, text=True)
    assert fetched.returncode == 0, fetched.stderr
    assert (pod.container.root / "models/nested/more.json").is_file()
    server = pod.server
    with pod.container.running(
        server["command"], variables(server), cwd=server["workingDir"], start_process=preloading
    ) as process:
        wait_for(lambda: pod.probe("startupProbe")[0] == 200, process=process, shown=lambda: pod.container.log)
        words = httpx.get(f"{pod.url}/v1/models", timeout=10).json()["words"]
        assert str(pod.container.root / "models") in words
        process.send_signal(signal.SIGTERM)
        assert process.wait(pod.spec["terminationGracePeriodSeconds"]) == 0
