"""An engine over several pods: a StatefulSet that runs as ``backend=kubernetes`` does.

Each pod starts ``launcher.backends.kubernetes.entrypoint``, as the pods of a submitted run do. The first one runs the
session, its ranks and the server; the others connect to it. Where one ends, all end, and the kubelets start all again.
"""

from __future__ import annotations

from dataclasses import fields, replace

from launcher.backends.kubernetes.manifest_parts import Manifest
from launcher.backends.kubernetes.pod_config import CONFIG_FILE, KEY_FILE, SNAPSHOT_FILE, PodConfig
from launcher.config.backend.base import Backend
from launcher.config.backend.kubernetes import KubernetesBackend
from launcher.config.deploy.kubernetes import KubernetesDeploy
from launcher.config.run import Run
from launcher.deploy.container_run import RUNS_FOLDER, SNAPSHOT_FOLDER
from launcher.execution.prepare import DEFAULT_PORT
from launcher.protocol.plan import RunIdentity

GATHER_S = 900
"""Time that pods wait for each other, while nodes are added and images pulled."""
INDEX_LABEL = "apps.kubernetes.io/pod-index"
"""By which the controller of StatefulSets numbers pods."""
_INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
_RUN_ID = "engine"


def run_of_group(run: Run, deploy: KubernetesDeploy, *, memory: str) -> Run:
    """Return a container's run with its ranks on all pods of the engine.

    Args:
        run: of one container.
        deploy: how many pods, and what each of them gets.
        memory: RAM of each.
    """
    common = {each.name: getattr(run.backend, each.name) for each in fields(Backend) if each.name != "port"}
    backend = KubernetesBackend(
        **common,
        port=DEFAULT_PORT if run.backend.port == "auto" else run.backend.port,
        image=deploy.server_image(run),
        nodes=deploy.pods_per_engine,
        gpus_per_node=deploy.gpus,
        cpus=deploy.cpus,
        memory=memory,
        shared_memory=deploy.shared_memory,
        mount=RUNS_FOLDER,
        namespace=deploy.namespace,
        python=deploy.python,
        gather_timeout_s=GATHER_S,
    )
    return replace(run, backend=backend)


def pod_config(run: Run, *, name: str, run_hash: str) -> str:
    """Return the text of ``pod.json``.

    Args:
        run: of the group.
        name: of the StatefulSet and of the Service that names its pods.
        run_hash: SHA-256 of its ``run.yaml``.
    """
    assert isinstance(run.backend.port, int), "run_of_group chooses one"
    folder = f"{RUNS_FOLDER}/{run.run.name}/{_RUN_ID}"
    identity = RunIdentity(run_id=_RUN_ID, run_dir=folder, run_hash=run_hash, port=run.backend.port)
    return PodConfig(job=name, identity=identity).dump()


def group_command(deploy: KubernetesDeploy) -> list[str]:
    """Return the command of every pod."""
    return [deploy.python, "-m", "launcher.backends.kubernetes.entrypoint", SNAPSHOT_FOLDER]


def index_variable() -> Manifest:
    """Return the variable by which a pod knows its number."""
    return {"name": _INDEX_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX_LABEL}']"}}}


def first_pod_probe(deploy: KubernetesDeploy, *, port: int, path: str, timeout_s: int) -> Manifest:
    """Return a probe that asks the server in the first pod, and holds at once in the others."""
    url = f"http://127.0.0.1:{port}{path}"
    asks = f"urllib.request.urlopen({url!r}, timeout={timeout_s - 1})"
    code = f"import os, urllib.request; os.environ[{_INDEX_VARIABLE!r}] != '0' or {asks}"
    return {"exec": {"command": [deploy.python, "-c", code]}, "timeoutSeconds": timeout_s}


def group_volume(deploy: KubernetesDeploy, *, config_name: str) -> Manifest:
    """Return the volume with run, pod config and the key by which the pods know each other."""
    config = {"name": config_name, "items": [{"key": each, "path": each} for each in (SNAPSHOT_FILE, CONFIG_FILE)]}
    key = {"name": deploy.pods_secret, "items": [{"key": KEY_FILE, "path": KEY_FILE}]}
    return {"projected": {"sources": [{"configMap": config}, {"secret": key}]}}
