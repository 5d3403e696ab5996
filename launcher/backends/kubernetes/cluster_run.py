"""A run in the cluster as other processes see it: its workload, its pods and how they ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from launcher.backends.kubernetes.kubectl import Kubectl
from launcher.backends.kubernetes.manifests import INDEX_LABEL, WORKLOADS, WorkloadKind
from launcher.errors import EXIT_PREEMPTED, EnvironmentProblem
from launcher.protocol.outcome import Failure, RunOutcome

_LOST = 255
"""Exit code of a run whose first pod reported none."""
_CANCELLED = 143
"""Exit code of a run that was deleted: its ranks got SIGTERM."""


@dataclass(frozen=True, kw_only=True)
class ClusterRun:
    """One run in one cluster."""

    kubectl: Kubectl
    kind: WorkloadKind
    job: str
    """Name of everything that belongs to the run."""

    @classmethod
    def of_job(cls, job: Mapping[str, str]) -> Self:
        """Return the run that the ``job`` of a ``session.json`` names.

        Raises:
            EnvironmentProblem: it is of no kind that this program creates.
        """
        kind = next((each for each in WORKLOADS.values() if each.resource == job["kind"]), None)
        if kind is None:
            kinds = ", ".join(each.resource for each in WORKLOADS.values())
            raise EnvironmentProblem(f"session.json names the kind {job['kind']} of a job in Kubernetes, not {kinds}")
        kubectl = Kubectl(namespace=job["namespace"], context=job.get("context"))
        return cls(kubectl=kubectl, kind=kind, job=job["name"])

    def workload(self) -> Any | None:
        """Return the workload; ``None`` if it was deleted."""
        return self.kubectl.find(f"{self.kind.resource}/{self.job}")

    def pods(self, *, all_pods: bool) -> list[Any]:
        """Return every first pod of the run, the oldest first; or all of its pods."""
        labels = f"app.kubernetes.io/instance={self.job}"
        labels += "" if all_pods else f",{self.kind.first_pod}"
        found: list[Any] = self.kubectl.get("pods", f"--selector={labels}")["items"]
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def outcome(self, workload: Any | None) -> RunOutcome | None:
        """Return how the run ended; ``None`` while it has not.

        The cause is what the first pod reported, else the pod whose exit caused the end.
        """
        status = status_of(workload, self.kind)
        if status == "deleted":
            return RunOutcome(status="cancelled", exit_code=_CANCELLED)
        if status == "completed":
            return RunOutcome(status="completed", exit_code=0)
        if status != "failed":
            return None
        first = self._ends(all_pods=False)
        causes = [end for end in (*self._ends(all_pods=True), *first) if end.code not in (0, EXIT_PREEMPTED)]
        if causes:
            return self._failed(causes[-1])
        if first:
            return RunOutcome(status="preempted", exit_code=EXIT_PREEMPTED)
        said = f"{self.job} failed, and its pods are gone, so the reason is unknown"
        return self._failed(PodEnd(pod=self.job, code=_LOST, said=said))

    def _ends(self, *, all_pods: bool) -> list[PodEnd]:
        return [end for pod in self.pods(all_pods=all_pods) if (end := pod_end(pod))]

    def _failed(self, end: PodEnd) -> RunOutcome:
        failure = Failure(
            host=end.pod,
            rank=None,
            exit_code=end.code,
            signal=None,
            reason=end.said,
            log=f"`kubectl describe {self.kind.resource} {self.job} --namespace={self.kubectl.namespace}`",
            time=time.time(),
        )
        return RunOutcome(status="failed", exit_code=end.code, failure=failure)


def status_of(workload: Any | None, kind: WorkloadKind) -> str:
    """Return ``running``, ``suspended``, ``completed``, ``failed`` or ``deleted``."""
    if workload is None:
        return "deleted"
    conditions = workload.get("status", {}).get("conditions", ())
    true = {condition["type"] for condition in conditions if condition["status"] == "True"}
    for status, condition in zip(("completed", "failed"), kind.conditions, strict=True):
        if condition in true:
            return status
    spec = workload.get("spec", {})
    return "suspended" if spec.get("suspend") or spec.get("runPolicy", {}).get("suspend") else "running"


def host_of(pod: Any) -> str:
    """Return the name that the plan gives a pod; empty if its labels have no index."""
    labels = pod["metadata"].get("labels", {})
    index = labels.get(INDEX_LABEL)
    if index is None:  # of a PyTorchJob
        number = labels.get("training.kubeflow.org/replica-index", "")
        is_master = labels.get("training.kubeflow.org/replica-type") == "master"
        index = "0" if is_master else str(int(number) + 1) if number.isdecimal() else ""
    return f"node{index}" if index else ""


def is_pending(pod: Any) -> bool:
    """Whether no container of a pod has started yet."""
    return str(pod["status"].get("phase", "Pending")) == "Pending"


def waiting_reason(pod: Any) -> str:
    """Return why a pod is pending: no node has room, or its image cannot be pulled."""
    for container in pod["status"].get("containerStatuses", ()):
        if waiting := container["state"].get("waiting"):
            return ": ".join(filter(None, (waiting.get("reason"), waiting.get("message"))))
    for condition in pod["status"].get("conditions", ()):
        if condition["status"] == "False" and condition.get("message"):
            return f"{condition.get('reason', condition['type'])}: {condition['message']}"
    return "waits to be scheduled"


@dataclass(frozen=True, kw_only=True)
class PodEnd:
    """How the container of a pod ended."""

    pod: str
    code: int
    said: str
    """The cause in its last line; without one, the cluster's own reason."""


def pod_end(pod: Any) -> PodEnd | None:
    """Return how a pod ended; ``None`` if its container has not."""
    for container in pod["status"].get("containerStatuses", ()):
        if ended := container["state"].get("terminated"):
            name, code = str(pod["metadata"]["name"]), int(ended["exitCode"])
            last = str(ended.get("message", "")).strip().rpartition("\n")[2]
            beginning = f"exit code {code}: "
            known = f"the pod {name} ended with exit code {code} ({ended.get('reason', 'Error')})"
            said = last.removeprefix(beginning) if last.startswith(beginning) else known
            return PodEnd(pod=name, code=code, said=said)
    return None
