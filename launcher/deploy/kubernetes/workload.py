"""The workload of a server, and the objects that every server has beside it."""

from __future__ import annotations

from launcher.backends.kubernetes.manifest_parts import Manifest
from launcher.backends.kubernetes.pod_config import CONFIG_FILE
from launcher.deploy.container_run import SNAPSHOT_FILE
from launcher.deploy.kubernetes.group import pod_config
from launcher.deploy.kubernetes.pod import CACHE, pod_spec
from launcher.deploy.kubernetes.server import PORT_NAME, Server

HASH_ANNOTATION = "launcher/run-hash"
_ISTIO_PORTS = (15008, 15020, 15021, 15090)
"""On which Istio reaches its proxy in a pod."""


def workload_manifests(server: Server) -> list[Manifest]:
    """Return what every server needs."""
    return [
        _service_account(server),
        _config_map(server),
        service(server.shared_metadata(), server, selector=server.client_selector),
        *version_services(server),
        _network_policy(server),
        _disruption_budget(server),
        stateful_set(server) if server.is_stateful else deployment(server),
    ]


def _service_account(server: Server) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": server.shared_metadata(),
        "automountServiceAccountToken": False,
    }


def _config_map(server: Server) -> Manifest:
    snapshot, run_hash = server.snapshot
    files = {SNAPSHOT_FILE: snapshot}
    if server.is_group:
        files[CONFIG_FILE] = pod_config(server.run_in_pod, name=server.versioned, run_hash=run_hash)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**server.metadata(server.config_name), "annotations": {HASH_ANNOTATION: run_hash}},
        "immutable": True,
        "data": files,
    }


def service(metadata: Manifest, server: Server, *, selector: dict[str, str], is_headless: bool = False) -> Manifest:
    """Return a Service.

    Args:
        metadata: with its name.
        server: whose pods it leads to.
        selector: labels of the pods.
        is_headless: whether its name resolves to the pods themselves.
    """
    port = {"name": PORT_NAME, "port": server.deploy.service_port, "targetPort": PORT_NAME, "appProtocol": "http"}
    headless: Manifest = {"clusterIP": "None"} if is_headless else {}
    if is_headless and server.is_group:
        headless["publishNotReadyAddresses"] = True  # the pods resolve each other's names before they are ready
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {**headless, "selector": selector, "ports": [port]},
    }


def version_services(server: Server) -> list[Manifest]:
    """Return the Service of this version alone, where a StatefulSet or a route refers to it."""
    if not server.is_stateful and server.deploy.traffic != "gateway":
        return []
    metadata = server.metadata()
    return [service(metadata, server, selector=server.selector, is_headless=server.is_stateful)]


def _network_policy(server: Server) -> Manifest:
    """Return what lets others connect to the server's port alone, not to that where ranks meet."""
    ports = [server.job.port, *(_ISTIO_PORTS if server.deploy.traffic == "istio" else ())]
    of_group = [{"from": [{"podSelector": {"matchLabels": server.selector}}]}] if server.is_group else []
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": server.metadata(),
        "spec": {
            "podSelector": {"matchLabels": server.selector},
            "policyTypes": ["Ingress"],
            "ingress": [{"ports": [{"protocol": "TCP", "port": port} for port in ports]}, *of_group],
        },
    }


def _disruption_budget(server: Server) -> Manifest:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": server.metadata(),
        "spec": {
            "maxUnavailable": server.deploy.max_unavailable,
            "selector": {"matchLabels": server.selector},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",  # a pod that does not serve keeps no node from being drained
        },
    }


def deployment(server: Server) -> Manifest:
    """Return the workload of engines of one rank."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": server.metadata(),
        "spec": {
            **_spec(server),
            "progressDeadlineSeconds": server.startup_s + 300,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        },
    }


def stateful_set(server: Server) -> Manifest:
    """Return the workload whose pods have names and caches of their own."""
    deploy = server.deploy
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CACHE},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": deploy.cache_size}}},
    }
    own_caches = {
        "volumeClaimTemplates": [claim],
        "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete", "whenScaled": "Retain"},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": server.metadata(),
        "spec": {
            **_spec(server),
            "serviceName": server.versioned,
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "RollingUpdate"},
            **({} if deploy.cache_claim else own_caches),
        },
    }


def _spec(server: Server) -> Manifest:
    deploy = server.deploy
    # the autoscaler alone sets the number: an apply would set it back
    replicas = {"replicas": server.num_pods} if deploy.autoscaling == "none" else {}
    return {
        **replicas,
        "revisionHistoryLimit": 3,
        "selector": {"matchLabels": server.selector},
        "template": {"metadata": {"labels": server.labels}, "spec": pod_spec(server)},
    }
