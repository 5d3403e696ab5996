"""A cluster that plays manifests: an API in a thread, and for every pod a real process in namespaces of its own.

It does what the documentation says of the controllers, as far as the tests need it: pods by index, their names and
environment, volumes, Secrets, the expansion of ``$(NAME)``, replacement of pods that failed, and when a job is over.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.conftest import REPOSITORY, Start, Started, start_interpreter
from tests.kubernetes_schemas import problems

KINDS = {
    "configmaps": "ConfigMap",
    "secrets": "Secret",
    "services": "Service",
    "pods": "Pod",
    "jobs.batch": "Job",
    "jobsets.jobset.x-k8s.io": "JobSet",
    "pytorchjobs.kubeflow.org": "PyTorchJob",
    "trainjobs.trainer.kubeflow.org": "TrainJob",
    "trainingruntimes.trainer.kubeflow.org": "TrainingRuntime",
}
WORKLOADS = {"Job": "Complete", "JobSet": "Completed", "TrainJob": "Complete", "PyTorchJob": "Succeeded"}


class Refusal(Exception):
    """What the API server, or kubectl, says no with."""


@dataclass
class Pod:
    """One pod that has been started."""

    index: int
    name: str
    manifest: dict[str, Any]
    process: Started
    log: Path
    is_disrupted: bool = False
    was_killed: bool = False
    is_deleted: bool = False
    kill_at: float = math.inf
    code: int | None = None

    @property
    def end(self) -> Path:
        """Exists once the log is complete."""
        return self.log.with_suffix(".end")

    def send(self, number: int) -> None:
        """Send a signal to the container's first process."""
        self.was_killed |= number == signal.SIGKILL
        for child in psutil.Process(self.process.pid).children():
            child.send_signal(number)


@dataclass
class Run:
    """One workload."""

    manifest: dict[str, Any]
    template: dict[str, Any]
    policy: dict[str, Any]
    hostnames: list[str]
    pods: list[Pod] = field(default_factory=list)
    num_failures: int = 0
    condition: str = ""

    def newest(self, index: int) -> Pod:
        """The pod that has the index now."""
        return [pod for pod in self.pods if pod.index == index][-1]


SANDBOX = Path(__file__).parent / "programs" / "sandbox.py"


class Cluster:
    """Everything, until ``close``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start_process: Start = start_interpreter
        """Starts the process that contains a pod."""
        self.calls: list[list[str]] = []
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.runs: dict[str, Run] = {}
        self.missing_kinds: set[str] = set()
        self.address = folder / "api"
        self._lock = threading.RLock()
        self._is_closed = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.address))
        self._listener.listen(16)
        self._threads = [threading.Thread(target=part, daemon=True) for part in (self._serve, self._control)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End every pod."""
        self._is_closed = True
        with socket.socket(socket.AF_UNIX) as wake:
            wake.connect(str(self.address))
        for thread in self._threads:
            thread.join(timeout=30)
        self._listener.close()
        for run in self.runs.values():
            for pod in run.pods:
                if pod.process.poll() is None:
                    with contextlib.suppress(psutil.Error):
                        pod.send(signal.SIGKILL)
                pod.process.wait(timeout=30)

    def the_run(self) -> Run:
        """The only one."""
        (run,) = self.runs.values()
        return run

    def admit(self) -> None:
        """Do what Kueue does once there is room for the run."""
        with self._lock:
            spec = self.the_run().manifest["spec"]
            spec.get("runPolicy", spec)["suspend"] = False

    def evict(self, index: int) -> None:
        """Do what a drained node does: mark the pod and send SIGTERM."""
        with self._lock:
            pod = self.the_run().newest(index)
            pod.is_disrupted = True
            pod.send(signal.SIGTERM)

    # what kubectl asks

    def _serve(self) -> None:
        while True:
            peer, _ = self._listener.accept()
            with peer:
                if self._is_closed:
                    return
                asked = json.loads(peer.makefile().readline())
                try:
                    with self._lock:
                        answer = {"out": "", "error": "", **self._answer(asked["words"], asked["document"])}
                except Refusal as refusal:
                    answer = {"out": "", "error": f"error: {refusal}\n"}
                peer.sendall(json.dumps(answer).encode() + b"\n")

    def _answer(self, words: list[str], document: str) -> dict[str, str]:
        self.calls.append(words)
        options = dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))
        verb, *names = [word for word in words if not word.startswith("--")]
        match verb:
            case "create" | "apply":
                for manifest in filter(None, yaml.safe_load_all(document)):
                    self._store(manifest, namespace=options["namespace"])
            case "get":
                try:
                    return {"out": json.dumps(self._get("/".join(names), options))}
                except Refusal:
                    if "ignore-not-found" not in options:
                        raise
            case "patch":
                patch = json.loads(options["patch"])
                self._object(names[0])["metadata"].update(patch["metadata"])
            case "logs":
                pod = next(p for run in self.runs.values() for p in run.pods if names[0] == f"pod/{p.name}")
                shown = pod.log.read_text(errors="replace").splitlines(keepends=True)
                if "follow" not in options:
                    return {"out": "".join(shown[-int(options.get("tail", len(shown))) or len(shown) :])}
                return {"follow": str(pod.log), "until": str(pod.end)}
            case "delete":
                self._delete(names, options)
            case _:
                raise Refusal(f"unknown command {verb}")
        return {}

    def _store(self, manifest: dict[str, Any], *, namespace: str) -> None:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind in self.missing_kinds:
            raise Refusal(f'resource mapping not found: no matches for kind "{kind}" in version "v1"')
        if found := problems(manifest):
            raise Refusal(f"{kind} is invalid: {found}")
        if manifest["metadata"]["namespace"] != namespace:
            raise Refusal("the namespace from the provided object does not match")
        if (kind, name) in self.objects:
            raise Refusal(f"{kind} {name} already exists")
        manifest["metadata"]["uid"] = str(uuid.uuid4())
        self.objects[kind, name] = manifest
        if kind in WORKLOADS:
            self.runs[name] = self._expand(manifest)

    def _get(self, what: str, options: dict[str, str]) -> Any:
        if what != "pods":
            found = copy.deepcopy(self._object(what))
            run = self.runs.get(found["metadata"]["name"])
            if run is not None and run.condition:
                found["status"] = {"conditions": [{"type": run.condition, "status": "True"}]}
            return found
        wanted = dict(pair.split("=") for pair in options["selector"].split(","))
        pods = [p.manifest for run in self.runs.values() for p in run.pods if not p.is_deleted or p.code is None]
        return {"items": [pod for pod in pods if wanted.items() <= pod["metadata"]["labels"].items()]}

    def _object(self, what: str) -> dict[str, Any]:
        resource, _, name = what.partition("/")
        try:
            return self.objects[KINDS[resource], name]
        except KeyError as error:
            raise Refusal(f'{resource} "{name}" not found') from error

    def _delete(self, names: list[str], options: dict[str, str]) -> None:
        resource, _, name = "/".join(names).partition("/")
        kind = KINDS[resource]
        if kind in self.missing_kinds:
            raise Refusal(f'the server does not have a resource type "{resource}"')
        gone = self.objects.pop((kind, name), None)
        if gone is None and "ignore-not-found" not in options:
            raise Refusal(f'{resource} "{name}" not found')
        if gone is not None:
            self._collect_garbage(gone["metadata"]["uid"])
            if kind in WORKLOADS:
                self._end_pods(self.runs[name])
                self.runs[name].condition = "Deleted"

    def _collect_garbage(self, uid: str) -> None:
        for key, found in list(self.objects.items()):
            if any(owner["uid"] == uid for owner in found["metadata"].get("ownerReferences", ())):
                del self.objects[key]

    # what controllers do

    def _expand(self, manifest: dict[str, Any]) -> Run:
        name, spec = manifest["metadata"]["name"], manifest["spec"]
        if manifest["kind"] == "PyTorchJob":
            template = spec["pytorchReplicaSpecs"]["Master"]["template"]
            num_workers = spec["pytorchReplicaSpecs"].get("Worker", {"replicas": 0})["replicas"]
            hostnames = [f"{name}-master-0", *(f"{name}-worker-{n}" for n in range(num_workers))]
            return Run(manifest, template, {"backoffLimit": 0}, hostnames)
        if manifest["kind"] == "TrainJob":
            runtime = self.objects["TrainingRuntime", spec["runtimeRef"]["name"]]
            spec = runtime["spec"]["template"]["spec"]
        base = name
        if manifest["kind"] != "Job":
            base = f"{name}-{spec['replicatedJobs'][0]['name']}-0"
            spec = spec["replicatedJobs"][0]["template"]["spec"]
        return Run(manifest, spec["template"], spec, [f"{base}-{n}" for n in range(spec["completions"])])

    def _control(self) -> None:
        while not self._is_closed:
            with self._lock:
                for run in self.runs.values():
                    self._look_after(run)
            time.sleep(0.1)

    def _look_after(self, run: Run) -> None:
        if not run.pods:
            if not run.condition and not is_suspended(run.manifest):
                for index in range(len(run.hostnames)):
                    self._start(run, index)
            return
        for pod in run.pods:
            if pod.code is None and pod.process.poll() is not None:
                self._note_end(run, pod)
            elif pod.code is None and time.monotonic() > pod.kill_at:
                with contextlib.suppress(psutil.Error):
                    pod.send(signal.SIGKILL)
        if run.condition or any(run.newest(index).code is None for index in range(len(run.hostnames))):
            return
        if all(run.newest(index).code == 0 for index in range(len(run.hostnames))):
            run.condition = WORKLOADS[run.manifest["kind"]]

    def _note_end(self, run: Run, pod: Pod) -> None:
        code = pod.process.returncode
        pod.code = 137 if pod.was_killed else code if code >= 0 else 128 - code
        said = pod.log.read_text(errors="replace")
        pod.end.touch()
        ended = {"exitCode": pod.code, "message": said[-2048:]}
        pod.manifest["status"] = {"phase": "Failed" if pod.code else "Succeeded"}
        pod.manifest["status"]["containerStatuses"] = [{"state": {"terminated": ended}}]
        if not pod.code or run.condition:
            return
        action = self._action(run, pod)
        run.num_failures += action == "Count"
        if action == "FailJob" or run.num_failures > run.policy["backoffLimit"]:
            run.condition = "Failed"
            self._end_pods(run)
        else:
            self._start(run, pod.index)

    def _action(self, run: Run, pod: Pod) -> str:
        for rule in run.policy.get("podFailurePolicy", {"rules": ()})["rules"]:
            if pod.code in rule.get("onExitCodes", {"values": ()})["values"]:
                return str(rule["action"])
            if pod.is_disrupted and "onPodConditions" in rule:
                return str(rule["action"])
        return "Count"

    def _end_pods(self, run: Run) -> None:
        for pod in run.pods:
            if pod.process.poll() is None:
                pod.is_deleted = True
                # a first process that has not asked for SIGTERM yet does not get it
                pod.kill_at = time.monotonic() + run.template["spec"]["terminationGracePeriodSeconds"]
                with contextlib.suppress(psutil.Error):
                    pod.send(signal.SIGTERM)

    # what a kubelet does

    def _start(self, run: Run, index: int) -> None:
        hostname = run.hostnames[index]
        name = f"{hostname}-{uuid.uuid4().hex[:5]}"
        spec = run.template["spec"]
        (container,) = spec["containers"]
        env = {
            **{key: os.environ[key] for key in ("PATH", "HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR")},
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
        }
        for source in container.get("envFrom", ()):
            env |= self.values("Secret", source["secretRef"]["name"])
        for entry in container.get("env", ()):
            chosen = entry.get("valueFrom", {}).get("secretKeyRef")
            env[entry["name"]] = self.values("Secret", chosen["name"])[chosen["key"]] if chosen else entry["value"]
        if run.manifest["kind"] == "PyTorchJob":
            env |= {"RANK": str(index), "WORLD_SIZE": str(len(run.hostnames)), "PET_NNODES": "7", "MASTER_PORT": "1"}
        else:
            env["JOB_COMPLETION_INDEX"] = str(index)
        command = [expand(word, env) for word in container["command"]]
        config = self._sandbox_config(run, name)
        config |= {"hostname": hostname, "env": env, "command": command, "cwd": "/"}
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(config))
        log = self.folder / f"{name}.log"
        command = [sys.executable, str(SANDBOX), str(file)]
        with log.open("wb") as output:
            process = self.start_process(command, cwd=self.folder, env=dict(os.environ), stdout=output, stderr=output)
        labels = dict(run.template["metadata"]["labels"])
        if run.manifest["kind"] == "PyTorchJob":
            replica = ("worker", index - 1) if index else ("master", 0)
            labels |= {
                f"training.kubeflow.org/replica-{n}": str(v) for n, v in zip(("type", "index"), replica, strict=True)
            }
        else:
            labels["batch.kubernetes.io/job-completion-index"] = str(index)
        manifest = {
            "metadata": {"name": name, "labels": labels, "creationTimestamp": f"{time.time():.6f}"},
            "status": {"phase": "Running"},
        }
        run.pods.append(Pod(index, name, manifest, process, log))

    def _sandbox_config(self, run: Run, pod: str) -> dict[str, Any]:
        """Return mounts and the hosts file; names resolve as the headless Service would have it."""
        job = run.manifest["metadata"]["name"]
        is_pytorch = run.manifest["kind"] == "PyTorchJob"
        container = run.template["spec"]["containers"][0]
        volumes = {volume["name"]: volume for volume in run.template["spec"]["volumes"]}
        mounts = [
            {
                "path": entry["mountPath"],
                "source": self._source_of(volumes[entry["name"]], pod),
                "is_read_only": entry.get("readOnly", False),
            }
            for entry in container["volumeMounts"]
        ]
        # the files of the test and its caches, which are part of the node here
        shared = [self.folder.parent, *(os.environ[name] for name in ("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"))]
        hosts = self.folder / f"{pod}.hosts"
        lines = [f"127.0.1.{n + 1} {h} {h if is_pytorch else f'{h}.{job}'}" for n, h in enumerate(run.hostnames)]
        hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        return {
            "mounts": mounts,
            "hosts": str(hosts),
            "shared": [str(path) for path in shared if Path(path).is_dir()],
            "is_read_only": container["securityContext"]["readOnlyRootFilesystem"],
        }

    def _source_of(self, volume: dict[str, Any], pod: str) -> str | None:
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            return None
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        folder = self.folder / (f"claim-{claim}" if claim else f"{pod}-{volume['name']}")
        folder.mkdir(exist_ok=True)
        for source in volume.get("projected", {"sources": ()})["sources"]:
            kind, chosen = ("ConfigMap", source["configMap"]) if "configMap" in source else ("Secret", source["secret"])
            values = self.values(kind, chosen["name"])
            data = folder / "..2026_01_01_00_00_00.1"  # a kubelet mounts links to files behind a link that it can swap
            data.mkdir(exist_ok=True)
            for link, target in {
                folder / "..data": data.name,
                **{folder / i["path"]: f"..data/{i['path']}" for i in chosen["items"]},
            }.items():
                if not link.is_symlink():
                    link.symlink_to(target)
            for item in chosen["items"]:
                (data / item["path"]).write_text(values[item["key"]], encoding="utf-8")
        return str(folder)

    def values(self, kind: str, name: str) -> dict[str, str]:
        """Return what a ConfigMap or a Secret holds."""
        data: dict[str, str] = self.objects[kind, name]["data"]
        return data if kind == "ConfigMap" else {k: base64.b64decode(v).decode() for k, v in data.items()}


def is_suspended(manifest: dict[str, Any]) -> bool:
    """Return whether a workload waits for a queue."""
    spec = manifest["spec"]
    return bool(spec.get("runPolicy", spec).get("suspend"))


def expand(text: str, env: dict[str, str]) -> str:
    """Return what a kubelet makes of a word of a command (``expansion.Expand`` of Kubernetes)."""
    out, i = "", 0
    while i < len(text):
        if text[i] != "$" or i + 1 == len(text):
            out, i = out + text[i], i + 1
        elif text[i + 1] == "$":
            out, i = out + "$", i + 2
        elif text[i + 1] == "(" and ")" in text[i + 2 :]:
            end = text.index(")", i + 2)
            name = text[i + 2 : end]
            out, i = out + env.get(name, f"$({name})"), end + 1
        else:
            out, i = out + text[i : i + 2], i + 2
    return out
