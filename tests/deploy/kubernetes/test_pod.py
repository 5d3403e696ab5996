"""What a pod would start, started here: the ConfigMap's run, with the container's command, variables and probes.

Paths of the container are folders below the test's; everything else is as in the manifests.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from launcher.utils.files import read_json
from launcher.utils.system import free_port
from tests.conftest import Start, Started
from tests.deploy.conftest import Render, manifests_of
from tests.helpers import wait_for
from tests.inference.server.conftest import events
from tests.processes import kill_marked, marked_environment, new_mark, wait_for_marked

TINY = (
    *("model=gpt2_tiny", "model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=2"),
    *("model.vocab_size=257", "job.tokenizer=bytes", "deploy.cpus=1", f"deploy.python={sys.executable}"),
)
SHAPES = ",".join(["[8,100]"] * 40)
"""Of a warm-up that a probe sees."""


@dataclass
class Pod:
    """A container's process, and the folders that it sees as its own."""

    container: dict[str, Any]
    root: Path
    process: Started
    mark: str

    @property
    def log(self) -> str:
        return (self.root / "log").read_text()

    def probe(self, name: str) -> tuple[int, str]:
        """Ask as the kubelet does; return status and text, 0 where nothing listens."""
        asked = self.container[name]["httpGet"]
        (port,) = (each["containerPort"] for each in self.container["ports"] if each["name"] == asked["port"])
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}{asked['path']}", timeout=10)
        except httpx.TransportError:
            return 0, ""
        return answer.status_code, answer.text

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.container['ports'][0]['containerPort']}"


@pytest.fixture
def pod(rendered: Render, preloading: Start, tmp_path: Path) -> Iterator[tuple[Pod, dict[str, Any]]]:
    """Start a pod, as a kubelet would; return it with its specification."""
    words = (f"job.port={free_port()}", f"job.warm_up=[{SHAPES}]", "deploy.pre_stop_s=1", "job.drain_s=30")
    found = manifests_of(rendered(*TINY, *words)[2])
    spec = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    root = tmp_path / "root"
    for mount in container["volumeMounts"]:
        place = root / mount["mountPath"].lstrip("/")
        (place.parent if "subPath" in mount else place).mkdir(parents=True, exist_ok=True)

    def here(text: str) -> str:
        """Return a path of the container as one of this machine."""
        return f"{root}{text}" if text.startswith(("/runs", "/run/", "/cache")) else text

    tree = yaml.safe_load(found["ConfigMap"]["data"]["run.yaml"])
    tree["run"]["root"] = here(tree["run"]["root"])
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == "snapshot")
    Path(here(mount["mountPath"])).write_text(yaml.safe_dump(tree))
    env = {each["name"]: here(each["value"]) for each in container["env"]}
    mark = new_mark()
    passed = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "XDG_CACHE_HOME")}
    env = {**passed, **env, **{name: value for name, value in marked_environment(mark).items() if value == mark}}
    with (root / "log").open("wb") as output:
        process = preloading(
            [here(word) for word in container["command"]],
            cwd=Path(here(container["workingDir"])),
            env=env,
            stdout=output,
            stderr=output,
        )
    yield Pod(container, root, process, mark), spec
    kill_marked(mark)
    process.wait()


def test_it_is_ready_once_warm_serves_and_drains(pod: tuple[Pod, dict[str, Any]]) -> None:
    running, spec = pod
    seen: list[tuple[int, str]] = []

    def is_warming_up() -> bool:
        seen.append(running.probe("startupProbe"))
        return "(warm up)" in seen[-1][1]

    wait_for(is_warming_up, process=running.process, shown=lambda: f"{seen}\n{running.log}")
    assert seen[-1][0] == running.probe("readinessProbe")[0] == 503
    assert running.probe("livenessProbe")[0] == 200  # so a long start is no reason to start again
    wait_for(lambda: running.probe("startupProbe")[0] == 200, process=running.process, shown=lambda: running.log)
    assert running.probe("readinessProbe")[0] == 200
    body = {"model": "gpt2_tiny", "prompt": "abc", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 8, answer.text

    # its end: endpoints are removed, preStop waits while the last requests arrive, then SIGTERM
    time.sleep(running.container["lifecycle"]["preStop"]["sleep"]["seconds"])
    assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).is_success
    long = {**body, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{running.url}/v1/completions", json=long, timeout=60) as stream:
        lines = stream.iter_text()
        first = next(lines)
        running.process.send_signal(signal.SIGTERM)
        rest = "".join(lines)
    got = list(events(httpx.Response(200, text=first + rest)))
    assert got[-1]["choices"][0]["finish_reason"] == "length", "it was finished, not cut"
    assert running.process.wait(spec["terminationGracePeriodSeconds"]) == 0
    assert not wait_for_marked(running.mark, seconds=10)
    assert "draining: 1 requests are open" in running.log
    (result,) = (running.root / "runs").glob("*/*/result.json")
    assert read_json(result)["status"] == "completed"
