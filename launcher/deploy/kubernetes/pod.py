"""The pod of a server: container, probes, volumes and what a restricted namespace demands."""

from __future__ import annotations

import math

from launcher.backends.kubernetes.manifest_parts import (
    TMP_FOLDER,
    Manifest,
    claim_mounts,
    claim_volumes,
    container_security,
    escape_references,
    folder_variables,
    pod_security,
    resources,
    temporary_mounts,
    temporary_volumes,
)
from launcher.config.inference import API_KEYS_VARIABLE
from launcher.config.kubernetes_objects import pull_policy
from launcher.deploy.container_run import RUNS_FOLDER, SNAPSHOT_FILE, SNAPSHOT_FOLDER, container_command
from launcher.deploy.kubernetes.group import GATHER_S, first_pod_probe, group_command, group_volume, index_variable
from launcher.deploy.kubernetes.server import PORT_NAME, Server

CACHE, CACHE_FOLDER = "cache", "/cache"
_MODEL = "model"
_SLACK_S = 15
"""Time, beyond the drain, for the launcher to end the engines and write the result files."""
_PERIOD_S = 10


def pod_spec(server: Server) -> Manifest:
    """Return the ``spec`` of the pods."""
    deploy = server.deploy
    optional: Manifest = {
        "nodeSelector": deploy.node_selector,
        "tolerations": list(deploy.tolerations),
        "imagePullSecrets": [{"name": name} for name in deploy.image_pull_secrets],
        "initContainers": _init_containers(server),
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": label,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": server.selector},
            }
            for label in deploy.spread
        ],
    }
    return {
        "serviceAccountName": server.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # no variables of other services in the namespace
        "terminationGracePeriodSeconds": termination_s(server),
        "securityContext": pod_security(user=deploy.run_as_user),
        **{key: value for key, value in optional.items() if value},
        "containers": [_container(server)],
        "volumes": _volumes(server),
    }


def termination_s(server: Server) -> int:
    """Return the seconds between the decision to end a pod and SIGKILL."""
    return server.deploy.pre_stop_s + math.ceil(server.job.shutdown_grace_s) + _SLACK_S


def _container(server: Server) -> Manifest:
    deploy = server.deploy
    live, ready = _probe(server, "live"), _probe(server, "ready")
    command = group_command(deploy) if server.is_group else container_command(deploy)
    start_s = server.startup_s + (GATHER_S if server.is_group else 0)
    return {
        "name": "server",
        "image": deploy.server_image(server.run),
        "imagePullPolicy": pull_policy(deploy.server_image(server.run)),
        "command": [escape_references(word) for word in command],
        "workingDir": RUNS_FOLDER,
        "ports": [{"name": PORT_NAME, "containerPort": server.job.port}],
        **_environment(server, has_clients=True),
        "resources": resources(cpus=deploy.cpus, memory=server.memory, gpus=deploy.gpus),
        # the engines are built and warmed up: until then no other probe is asked
        "startupProbe": {
            **ready,
            "periodSeconds": _PERIOD_S,
            "failureThreshold": max(3, math.ceil(start_s / _PERIOD_S)),
        },
        "readinessProbe": {**ready, "periodSeconds": 5, "failureThreshold": 2},
        # the process that answers takes no steps: a long step delays nothing here
        "livenessProbe": {**live, "periodSeconds": _PERIOD_S, "failureThreshold": 6},
        **({"lifecycle": {"preStop": {"sleep": {"seconds": deploy.pre_stop_s}}}} if deploy.pre_stop_s else {}),
        "terminationMessagePolicy": "FallbackToLogsOnError",  # so that `kubectl describe` shows the last block
        "securityContext": container_security(),
        "volumeMounts": [
            _snapshot_mount(server),
            {"name": "runs", "mountPath": RUNS_FOLDER},
            {"name": CACHE, "mountPath": CACHE_FOLDER},
            *temporary_mounts(),
            *_model_mount(server, is_read_only=True),
            *claim_mounts(deploy.volumes, is_read_only=True),
        ],
    }


def _probe(server: Server, name: str) -> Manifest:
    path = f"/health/{name}"
    if server.is_group:
        return first_pod_probe(server.deploy, port=server.job.port, path=path, timeout_s=_PERIOD_S)
    return {"httpGet": {"path": path, "port": PORT_NAME}, "timeoutSeconds": _PERIOD_S}


def _snapshot_mount(server: Server) -> Manifest:
    mount = {"name": "snapshot", "readOnly": True}
    if server.is_group:
        return {**mount, "mountPath": SNAPSHOT_FOLDER}
    # a file of its own: what a whole ConfigMap mounts are links, which are never read as run.yaml
    return {**mount, "mountPath": f"{SNAPSHOT_FOLDER}/{SNAPSHOT_FILE}", "subPath": SNAPSHOT_FILE}


def _environment(server: Server, *, has_clients: bool) -> Manifest:
    """Return a container's variables: folders to write in, and those of Secrets by name.

    Args:
        server: of the pod.
        has_clients: whether the container compares the keys that clients send.
    """
    deploy = server.deploy
    plain = folder_variables(CACHE_FOLDER)
    variables: list[Manifest] = [{"name": name, "value": value} for name, value in plain.items()]
    if server.is_group:
        variables.append(index_variable())
    if deploy.keys_from is not None and has_clients:
        key = {"name": deploy.keys_from, "key": API_KEYS_VARIABLE}
        variables.append({"name": API_KEYS_VARIABLE, "valueFrom": {"secretKeyRef": key}})
    named = {"envFrom": [{"secretRef": {"name": deploy.secret}}]} if deploy.secret else {}
    return {**named, "env": variables}


def _model_mount(server: Server, *, is_read_only: bool) -> list[Manifest]:
    deploy = server.deploy
    if not deploy.is_mounted:
        return []
    mount: Manifest = {"name": _MODEL, "mountPath": deploy.model_path, "readOnly": is_read_only}
    return [{**mount, **({"subPath": deploy.model_subpath} if deploy.model_subpath else {})}]


def _init_containers(server: Server) -> list[Manifest]:
    """Return the container that copies the model's files from an object store, if any."""
    deploy = server.deploy
    if deploy.model_from != "object_store":
        return []
    command = (deploy.python, "-m", "launcher.deploy.fetch", deploy.model_source or "", deploy.model_path)
    return [
        {
            "name": "fetch-model",
            "image": deploy.image,
            "imagePullPolicy": pull_policy(deploy.image),
            "command": [escape_references(word) for word in command],
            **_environment(server, has_clients=False),
            "resources": resources(cpus=1, memory="2Gi"),
            "securityContext": container_security(),
            "volumeMounts": [
                *_model_mount(server, is_read_only=False),
                {"name": CACHE, "mountPath": CACHE_FOLDER},
                {"name": "tmp", "mountPath": TMP_FOLDER},
            ],
        }
    ]


def _snapshot_volume(server: Server) -> Manifest:
    if server.is_group:
        return group_volume(server.deploy, config_name=server.config_name)
    return {"configMap": {"name": server.config_name}}


def _volumes(server: Server) -> list[Manifest]:
    deploy = server.deploy
    volumes: list[Manifest] = [
        {"name": "snapshot", **_snapshot_volume(server)},
        {"name": "runs", "emptyDir": {}},
        *temporary_volumes(shared_memory=deploy.shared_memory),
    ]
    if deploy.cache_claim is not None:
        volumes.append({"name": CACHE, "persistentVolumeClaim": {"claimName": deploy.cache_claim}})
    elif not server.is_stateful:  # whose pods have claims of their own
        volumes.append({"name": CACHE, "emptyDir": {"sizeLimit": deploy.cache_size}})
    source = deploy.model_source
    if deploy.model_from == "claim":
        volumes.append({"name": _MODEL, "persistentVolumeClaim": {"claimName": source, "readOnly": True}})
    elif deploy.model_from == "image_volume":
        volumes.append({"name": _MODEL, "image": {"reference": source, "pullPolicy": pull_policy(source or "")}})
    elif deploy.model_from == "object_store":
        volumes.append({"name": _MODEL, "emptyDir": {"sizeLimit": deploy.cache_size}})
    return [*volumes, *claim_volumes(deploy.volumes, is_read_only=True)]
