"""An engine over several pods: its manifests, and the pods themselves, played by processes in namespaces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from launcher.errors import ConfigErrors
from launcher.utils.files import sha256_of
from tests.backends.kubernetes.cluster import SANDBOX
from tests.backends.kubernetes.conftest import NO_NAMESPACES, has_namespaces
from tests.conftest import REPOSITORY, Start, Started
from tests.deploy.conftest import Render, manifests_of
from tests.deploy.containers import Container
from tests.helpers import wait_for
from tests.kubernetes_schemas import problems, unrestricted
from tests.ports import free_port

WORDS = (
    *("model=llama_tiny", "model.vocab_size=257", "job.tokenizer=bytes", "parallel=tensor", "parallel.tensor=2"),
    *("deploy.name=chat", "deploy.cpus=1", "deploy.pods_per_engine=2", "deploy.pods_secret=key"),
)


def test_the_manifests_are_valid_and_clients_reach_the_first_pod(rendered: Render) -> None:
    run, plan, files = rendered(*WORDS, "deploy.gpus=1", "deploy.namespace=ml")
    manifests = [yaml.safe_load(text) for path, text in files.items() if path.startswith("manifests/")]
    assert {each["kind"]: problems(each) for each in manifests} == {each["kind"]: [] for each in manifests}
    found = manifests_of(files)
    spec = found["StatefulSet"]["spec"]
    pod = spec["template"]["spec"]
    assert list(unrestricted(pod)) == []
    assert (spec["replicas"], spec["podManagementPolicy"], spec["serviceName"]) == (2, "Parallel", "chat-v1")
    assert len(plan.hosts) == 2
    services = {each["metadata"]["name"]: each["spec"] for each in manifests if each["kind"] == "Service"}
    assert services["chat"]["selector"]["apps.kubernetes.io/pod-index"] == "0"
    assert "pod-index" not in str(services["chat-v1"]["selector"])
    assert services["chat-v1"]["publishNotReadyAddresses"], "pods find each other before they are ready"
    ports, others = found["NetworkPolicy"]["spec"]["ingress"]
    assert [each["port"] for each in ports["ports"]] == [run.job.port]
    assert others == {"from": [{"podSelector": {"matchLabels": spec["selector"]["matchLabels"]}}]}
    one = manifests_of(rendered(*WORDS[:5], "deploy.cpus=1")[2])["StatefulSet"]["spec"]["template"]["spec"]
    memory = [each["containers"][0]["resources"]["limits"]["memory"] for each in (pod, one)]
    assert int(memory[0].removesuffix("Gi")) < int(memory[1].removesuffix("Gi")), "each has its share of the ranks"


REFUSED = {
    "no key": ((*WORDS[:-1],), "deploy.pods_secret: an engine has 2 pods"),
    "a key for nothing": (("deploy.pods_secret=key",), "set deploy.pods_per_engine"),
    "one rank": (WORDS[5:], "an engine has 1 rank, which cannot be divided"),
    "several engines": ((*WORDS, "deploy.replicas=2"), "deploy.replicas=2"),
    "an autoscaler": ((*WORDS, "deploy.autoscaling=hpa"), "deploy.autoscaling=hpa: an engine has 2 pods"),
    "a route to all pods": (
        (*WORDS, "deploy.traffic=gateway", "deploy.gateway=a/b", "deploy.hostnames=[m.example.org]"),
        "deploy.traffic=gateway: an engine has 2 pods",
    ),
    "a Deployment": ((*WORDS, "deploy.workload=deployment"), "deploy.workload=deployment"),
    "none": ((*WORDS, "deploy.pods_per_engine=0"), "deploy.pods_per_engine=0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_such_an_engine_has_not_is_refused(rendered: Render, case: str) -> None:
    words, message = REFUSED[case]
    with pytest.raises(ConfigErrors) as caught:
        rendered(*words)
    assert message in str(caught.value).replace(" (command line)", "")


def test_a_chart_has_no_such_engine(rendered: Render) -> None:
    with pytest.raises(ConfigErrors, match=r"deploy\.pods_per_engine=2.*set deploy=kubernetes"):
        rendered(*WORDS, kind="helm")


class Group:
    """The pods of one engine, as kubelets start and restart them: what is mounted stays."""

    def __init__(self, files: dict[str, str], folder: Path, start_process: Start) -> None:
        found = manifests_of(files)
        workload = found["StatefulSet"]
        self.name, self.spec = workload["metadata"]["name"], workload["spec"]["template"]["spec"]
        (self.container,) = self.spec["containers"]
        self._folder, self._start_process = folder, start_process
        self._here = Container(folder / "root", ("/runs", "/cache"))
        data = found["ConfigMap"]["data"]
        snapshot = data["run.yaml"].replace("/runs\n", f"{self._here.here('/runs')}\n")
        config = data["pod.json"].replace("/runs/", f"{self._here.here('/runs')}/")
        config = config.replace(sha256_of(data["run.yaml"].encode()), sha256_of(snapshot.encode()))
        self._mounted = {"run.yaml": snapshot, "pod.json": config, "key": "0123456789abcdef"}
        self.pods: list[Started] = []

    def start(self) -> None:
        """Start the container of every pod."""
        self.pods = [self._start(number) for number in (0, 1)]

    def _start(self, number: int) -> Started:
        mounts = []
        for each in self.container["volumeMounts"]:
            source = self._folder / f"pod{number}" / each["name"]
            source.mkdir(parents=True, exist_ok=True)
            kept = None if each["name"] == "shm" else str(source)
            place = self._here.here(each["mountPath"])
            mounts.append({"path": place, "source": kept, "is_read_only": each.get("readOnly", False)})
        for name, text in self._mounted.items():
            (self._folder / f"pod{number}/snapshot" / name).write_text(text)
        hosts = self._folder / f"hosts{number}"
        names = [f"127.0.1.{n + 1} {self.name}-{n} {self.name}-{n}.{self.name}" for n in (0, 1)]
        hosts.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        env = {name: os.environ[name] for name in ("PATH", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR")}
        env |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "JOB_COMPLETION_INDEX": str(number)}
        env |= {each["name"]: self._here.here(each["value"]) for each in self.container["env"] if "value" in each}
        shared = [self._folder, *(env[name] for name in ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"))]
        config = {
            "shared": [str(path) for path in shared if Path(path).is_dir()],
            "is_read_only": self.container["securityContext"]["readOnlyRootFilesystem"],
            "mounts": mounts,
            "hosts": str(hosts),
            "hostname": f"{self.name}-{number}",
            "env": env,
            "command": self.container["command"],
            "cwd": "/",
        }
        file = self._folder / f"pod{number}.json"
        file.write_text(json.dumps(config))
        with (self._folder / f"pod{number}.log").open("ab") as output:
            return self._start_process(
                [sys.executable, str(SANDBOX), str(file)],
                cwd=self._folder,
                env=dict(os.environ),
                stdout=output,
                stderr=output,
            )

    def log(self) -> str:
        return "".join((self._folder / f"pod{number}.log").read_text() for number in (0, 1))

    def is_ready(self, number: int) -> bool:
        """Probe as the kubelet does."""
        command = self.container["readinessProbe"]["exec"]["command"]
        env = {**os.environ, "JOB_COMPLETION_INDEX": str(number)}
        return subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0

    def send(self, number: int, pod: int) -> None:
        """Send a signal to the first process of a container."""
        for child in psutil.Process(self.pods[pod].pid).children():
            child.send_signal(number)


def test_the_pods_serve_as_one_start_again_as_one_and_drain(
    rendered: Render, preloading: Start, tmp_path: Path
) -> None:
    if not has_namespaces():
        pytest.skip(NO_NAMESPACES)
    port = free_port()
    words = (f"job.port={port}", f"backend.port={free_port(together=2)}", f"deploy.python={sys.executable}")
    words = (*words, "job.warm_up=[[1,4]]", "job.kv_cache_tokens=512", "model.num_hidden_layers=1")
    group = Group(rendered(*WORDS, *words)[2], tmp_path, preloading)
    body = {"model": "llama_tiny", "prompt": "abc", "max_tokens": 8, "temperature": 0}
    answers: list[Any] = []
    try:
        for _ in range(2):
            group.start()
            assert not group.is_ready(0)
            assert group.is_ready(1), "no client connects to it"
            wait_for(lambda: group.log().count("serving") > len(answers), process=group.pods[0], shown=group.log)
            assert group.is_ready(0)
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            assert answer.is_success, answer.text
            answers.append(answer.json()["choices"])
            if len(answers) == 1:
                group.send(signal.SIGKILL, 1)
                assert all(pod.wait(60) != 0 for pod in group.pods), "the kubelets start both again"
        assert answers[0] == answers[1]
        for number in (0, 1):
            group.send(signal.SIGTERM, number)
        limit = group.spec["terminationGracePeriodSeconds"]
        assert group.pods[0].wait(limit) == 0, group.log()
        group.pods[1].wait(limit)
    finally:
        for pod in group.pods:
            if pod.poll() is None:
                pod.kill()
                pod.wait()
    assert "draining: 0 requests are open" in group.log()
