"""The object that makes the pods: one function for each kind that a cluster may offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.backends.kubernetes.names import REPLICATED_JOB, Workload
from launcher.backends.kubernetes.pods import Manifest, Submission, pod_spec
from launcher.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_USER_ERROR

if TYPE_CHECKING:
    from launcher.backends.kubernetes.backend import Kubernetes

_INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True, kw_only=True)
class WorkloadKind:
    """One kind of controller."""

    manifests: Callable[[Submission], list[Manifest]]
    resource: str
    """What kubectl calls it, with its group, so that a namesake of another group is not meant."""
    others: tuple[str, ...] = ()
    """Further resources that ``manifests`` makes."""
    first_pod: str = f"{_INDEX}=0"
    """Label of the pod that speaks for the run."""
    conditions: tuple[str, str] = ("Complete", "Failed")
    """Its condition after success, and after failure."""


def indexed_job(submission: Submission) -> list[Manifest]:
    """Return an Indexed Job and the headless Service that gives its pods their names."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": submission.metadata(),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the pods look for each other before anything else
            "selector": {"app.kubernetes.io/instance": submission.job},
        },
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": submission.metadata(),
        "spec": {
            **_time_to_live(submission),
            **_job_spec(submission, container="launcher", subdomain=submission.job),
        },
    }
    return [service, job]


def jobset(submission: Submission) -> list[Manifest]:
    """Return a JobSet with one Indexed Job in it; its controller makes the Service."""
    return [
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": submission.metadata(),
            "spec": _jobset_spec(submission, labels={}),
        }
    ]


def trainjob(submission: Submission) -> list[Manifest]:
    """Return a TrainJob of Kubeflow's Trainer and the runtime, of this run alone, that it refers to.

    The runtime leaves out the policy for torch: torchrun is started by us, with our own rendezvous.
    """
    num_nodes = submission.backend.nodes
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": submission.metadata(),
        "spec": {
            "mlPolicy": {"numNodes": num_nodes},
            "template": {
                "spec": _jobset_spec(submission, labels={"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"})
            },
        },
    }
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": submission.metadata(),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": submission.job},
            "trainer": {"numNodes": num_nodes},
        },
    }
    return [runtime, job]


def pytorchjob(submission: Submission) -> list[Manifest]:
    """Return a PyTorchJob of Kubeflow's training operator; the first pod is its master."""

    def replicas(count: int) -> Manifest:
        template = {
            "metadata": {"labels": submission.labels},
            "spec": pod_spec(submission, container="pytorch"),
        }
        return {"replicas": count, "restartPolicy": "Never", "template": template}

    num_workers = submission.backend.nodes - 1
    specs = {"Master": replicas(1), **({"Worker": replicas(num_workers)} if num_workers else {})}
    return [
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": submission.metadata(),
            "spec": {
                "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": 0, **_time_to_live(submission)},
                "pytorchReplicaSpecs": specs,
            },
        }
    ]


def _time_to_live(submission: Submission) -> Manifest:
    seconds = submission.backend.ttl_s
    return {} if seconds is None else {"ttlSecondsAfterFinished": seconds}


def _jobset_spec(submission: Submission, *, labels: dict[str, str]) -> Manifest:
    group = {
        "name": REPLICATED_JOB,
        "replicas": 1,
        "template": {
            **({"metadata": {"labels": labels}} if labels else {}),
            "spec": _job_spec(submission, container=REPLICATED_JOB),
        },
    }
    return {
        **_time_to_live(submission),
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": submission.job},
        "replicatedJobs": [group],
    }


def _job_spec(submission: Submission, *, container: str, subdomain: str | None = None) -> Manifest:
    """Return an Indexed Job's spec.

    The first pod speaks for the run; the others end with 75 whenever it did not end well. So 75 starts a pod again and
    counts for nothing, and every other code counts once a run.
    """
    num_nodes = submission.backend.nodes
    return {
        "completionMode": "Indexed",
        "completions": num_nodes,
        "parallelism": num_nodes,
        "backoffLimit": submission.backend.restarts,
        "podReplacementPolicy": "Failed",  # never two pods of one index
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [EXIT_USER_ERROR, EXIT_BAD_INPUT]}},
                {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [EXIT_PREEMPTED]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {
            "metadata": {"labels": submission.labels},
            "spec": pod_spec(submission, container=container, subdomain=subdomain),
        },
    }


WORKLOADS: dict[Workload, WorkloadKind] = {
    "indexed_job": WorkloadKind(manifests=indexed_job, resource="jobs.batch", others=("services",)),
    "jobset": WorkloadKind(manifests=jobset, resource="jobsets.jobset.x-k8s.io", conditions=("Completed", "Failed")),
    "trainjob": WorkloadKind(
        manifests=trainjob,
        resource="trainjobs.trainer.kubeflow.org",
        others=("trainingruntimes.trainer.kubeflow.org",),
    ),
    "pytorchjob": WorkloadKind(
        manifests=pytorchjob,
        resource="pytorchjobs.kubeflow.org",
        first_pod="training.kubeflow.org/replica-type=master",
        conditions=("Succeeded", "Failed"),
    ),
}
"""Every value of ``backend.workload``."""


def job_reference(backend: Kubernetes, job: str) -> dict[str, str]:
    """Return what the cluster calls a run, for ``session.json``."""
    context = {"context": backend.context} if backend.context else {}
    return {"kind": WORKLOADS[backend.workload].resource, "name": job, "namespace": backend.namespace, **context}
