"""ServiceAccount, ConfigMap, Service and the workload of a server."""

from __future__ import annotations

from launcher.backends.kubernetes.manifests import GPU, Manifest, escape_references
from launcher.config.deploy.kubernetes import KubernetesDeploy
from launcher.config.job.serve import Serve
from launcher.config.run import Run
from launcher.deploy.container_run import (
    RUNS_FOLDER,
    SNAPSHOT_FOLDER,
    container_command,
    container_run,
    snapshot_with_hash,
)
from launcher.protocol.plan import Plan

PORT_NAME = "http"


def workload_manifests(run: Run, plan: Plan) -> list[Manifest]:
    """Return what every server needs."""
    deploy = run.deploy
    assert isinstance(deploy, KubernetesDeploy)
    name = deploy.object_name(run)
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "launcher"}
    metadata = {"name": name, "namespace": deploy.namespace, "labels": labels}
    hosts = [name, f"{name}.{deploy.namespace}", f"{name}.{deploy.namespace}.svc"]
    job = run.job
    assert isinstance(job, Serve)
    snapshot, run_hash = snapshot_with_hash(container_run(run, names=[*hosts, f"{hosts[-1]}.cluster.local"]))
    config = f"{name}-{run_hash[:10]}"
    resources = {"cpu": str(deploy.cpus), "memory": str(deploy.memory_bytes(run, plan))}
    if deploy.gpus:
        resources[GPU] = str(deploy.gpus)
    container = {
        "name": "server",
        "image": deploy.image,
        "command": [escape_references(word) for word in container_command(deploy)],
        "ports": [{"name": PORT_NAME, "containerPort": job.port}],
        "resources": {"requests": resources, "limits": resources.copy()},
        "volumeMounts": [
            {"name": "snapshot", "mountPath": SNAPSHOT_FOLDER, "readOnly": True},
            {"name": "runs", "mountPath": RUNS_FOLDER},
        ],
    }
    pod = {
        "serviceAccountName": name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [container],
        "volumes": [
            {"name": "snapshot", "configMap": {"name": config}},
            {"name": "runs", "emptyDir": {}},
        ],
    }
    selector = {"app.kubernetes.io/name": name}
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": metadata,
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {**metadata, "name": config},
            "immutable": True,
            "data": {"run.yaml": snapshot},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "selector": selector,
                "ports": [{"name": PORT_NAME, "port": 80, "targetPort": PORT_NAME}],
            },
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                "replicas": deploy.replicas,
                "selector": {"matchLabels": selector},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
    ]
