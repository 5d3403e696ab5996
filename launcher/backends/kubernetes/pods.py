"""The pod that every workload repeats: one container that runs ``python -m launcher.pod``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.backends.kubernetes.orders import FOLDER, KEY, ORDERS, SNAPSHOT, PodOrders

if TYPE_CHECKING:
    from launcher.backends.kubernetes.backend import Kubernetes
    from launcher.plan import Plan

Manifest = dict[str, Any]
GPU = "nvidia.com/gpu"

_SLACK_S = 15.0
"""Beyond what ranks get to save: time to write down how the run ended."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What manifests are made from."""

    backend: Kubernetes
    plan: Plan
    orders: PodOrders

    @property
    def job(self) -> str:
        """Name of everything that belongs to the run."""
        return self.orders.job

    @property
    def labels(self) -> dict[str, str]:
        """By which everything of the run is found."""
        return {"app.kubernetes.io/name": "launcher", "app.kubernetes.io/instance": self.job}

    def metadata(self) -> Manifest:
        """Return the metadata of an object of the run."""
        return {"name": self.job, "namespace": self.backend.namespace, "labels": self.labels}


def pod_spec(submission: Submission, *, container: str, subdomain: str | None = None) -> Manifest:
    """Return the ``spec`` of the pods.

    Args:
        submission: the run.
        container: name of the container; some controllers look for a certain one.
        subdomain: name of the headless Service, where the controller does not set it.
    """
    backend, plan = submission.backend, submission.plan
    optional: Manifest = {
        "subdomain": subdomain,
        "serviceAccountName": backend.service_account,
        "nodeSelector": backend.node_selector,
        "tolerations": list(backend.tolerations),
        "imagePullSecrets": [{"name": name} for name in backend.image_pull_secrets],
    }
    return {
        "restartPolicy": "Never",  # a pod is replaced, never patched up: then its controller counts
        "terminationGracePeriodSeconds": math.ceil(max(plan.grace_s, plan.preempt_grace_s) + _SLACK_S),
        "enableServiceLinks": False,  # variables of other people's services
        **{key: value for key, value in optional.items() if value},
        "containers": [_container(submission, container)],
        "volumes": _volumes(submission),
    }


def _container(submission: Submission, name: str) -> Manifest:
    backend = submission.backend
    resources = {"cpu": str(backend.cpus), "memory": backend.memory}
    if backend.gpus_per_node:
        resources[GPU] = str(backend.gpus_per_node)
    return {
        "name": name,
        "image": backend.image,
        "command": [literal(word) for word in (backend.python, "-m", "launcher.pod", FOLDER)],
        **({"envFrom": [{"secretRef": {"name": backend.secret}}]} if backend.secret else {}),
        **({"env": env} if (env := _forwarded(submission)) else {}),
        # requests like limits: neither the cores of the plan nor its memory are promised to anybody else
        "resources": {"requests": resources, "limits": resources.copy()},
        "terminationMessagePolicy": "FallbackToLogsOnError",  # so that `kubectl describe` shows the last block
        "volumeMounts": [
            {"name": "launcher", "mountPath": FOLDER, "readOnly": True},
            {"name": "runs", "mountPath": backend.mount},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 (where ranks of one host meet)
            *({"name": f"data-{n}", "mountPath": path} for n, path in enumerate(backend.volumes.values())),
        ],
    }


def _forwarded(submission: Submission) -> list[Manifest]:
    """Return the variables of the launching environment: by name alone, their values are in the run's Secret."""
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": submission.job, "key": name}}}
        for name in submission.plan.forward
    ]


def _volumes(submission: Submission) -> list[Manifest]:
    backend, job = submission.backend, submission.job
    told = {"name": job, "items": [{"key": name, "path": name} for name in (SNAPSHOT, ORDERS)]}
    key = {"name": job, "items": [{"key": KEY, "path": KEY}]}
    runs: Manifest = {"persistentVolumeClaim": {"claimName": backend.claim}} if backend.claim else {"emptyDir": {}}
    return [
        {"name": "launcher", "projected": {"sources": [{"configMap": told}, {"secret": key}]}},
        {"name": "runs", **runs},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": backend.shared_memory}},
        *(
            {"name": f"data-{n}", "persistentVolumeClaim": {"claimName": claim}}
            for n, claim in enumerate(backend.volumes)
        ),
    ]


def literal(word: str) -> str:
    """Return ``word`` so that it arrives unchanged: Kubernetes replaces ``$(NAME)`` and turns ``$$`` into ``$``."""
    return word.replace("$", "$$")
