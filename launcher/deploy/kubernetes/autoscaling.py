"""What sets the number of pods: a HorizontalPodAutoscaler, or KEDA's ScaledObject."""

from __future__ import annotations

from launcher.backends.kubernetes.manifest_parts import Manifest
from launcher.deploy.kubernetes.pod import termination_s
from launcher.deploy.kubernetes.server import Server
from launcher.protocol.serving_metrics import NUM_RUNNING, NUM_WAITING

_LEAST_WINDOW_S = 300


def autoscaling_manifests(server: Server) -> list[Manifest]:
    """Return the autoscaler, if there is one."""
    match server.deploy.autoscaling:
        case "hpa":
            return [horizontal_pod_autoscaler(server)]
        case "keda":
            return [scaled_object(server)]
        case _:
            return []


def horizontal_pod_autoscaler(server: Server) -> Manifest:
    """Return an autoscaler on the metrics of the pods, which an adapter for Prometheus serves."""
    deploy = server.deploy
    # running and waiting are two metrics; the larger number of pods of the two is taken
    targets = {NUM_RUNNING: deploy.target_requests, NUM_WAITING: max(1, deploy.target_requests // 4)}
    metrics = [
        {
            "type": "Pods",
            "pods": {"metric": {"name": name}, "target": {"type": "AverageValue", "averageValue": str(target)}},
        }
        for name, target in targets.items()
    ]
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": server.metadata(),
        "spec": {
            "scaleTargetRef": dict(server.workload),
            "minReplicas": deploy.min_replicas,
            "maxReplicas": deploy.max_replicas,
            "metrics": metrics,
            "behavior": _behavior(server),
        },
    }


def scaled_object(server: Server) -> Manifest:
    """Return an autoscaler on the requests of all pods, and on those that wait at the gateway."""
    deploy = server.deploy
    ends = "[0-9]+" if server.is_stateful else "[^-]+-[^-]+"  # as controllers name pods
    labels = f'namespace="{deploy.namespace}",pod=~"{server.versioned}-{ends}"'
    requests = f"(sum({NUM_RUNNING}{{{labels}}}) or vector(0)) + (sum({NUM_WAITING}{{{labels}}}) or vector(0))"
    queries = [requests, *([deploy.queue_query] if deploy.queue_query else [])]
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": server.metadata(),
        "spec": {
            "scaleTargetRef": dict(server.workload),
            "minReplicaCount": deploy.min_replicas,
            "maxReplicaCount": deploy.max_replicas,
            # a pod that is loading serves nothing yet and must not count as idle
            "initialCooldownPeriod": server.startup_s + _LEAST_WINDOW_S,
            "cooldownPeriod": server.startup_s + _LEAST_WINDOW_S,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior(server)}},
            "triggers": [
                {
                    "type": "prometheus",
                    "metadata": {
                        "serverAddress": deploy.prometheus,
                        "query": query,
                        "threshold": str(deploy.target_requests),
                        "activationThreshold": "0",
                    },
                }
                for query in queries
            ],
        },
    }


def _behavior(server: Server) -> Manifest:
    """Return how fast pods come and go: none goes before one that was started with it can serve."""
    return {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "policies": [{"type": "Percent", "value": 100, "periodSeconds": 60}],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": min(3600, max(_LEAST_WINDOW_S, server.startup_s)),
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": min(1800, max(60, termination_s(server)))}],
        },
    }
