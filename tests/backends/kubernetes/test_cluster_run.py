"""What other shells see of a run in the cluster: pods, lines of logs, and why there are none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from launcher.backends.kubernetes import cluster_run as module
from launcher.backends.kubernetes.cluster_run import ClusterRun, host_of
from launcher.backends.kubernetes.cluster_state import read_cluster_state
from launcher.backends.kubernetes.kubectl import Kubectl
from launcher.backends.kubernetes.manifests import WORKLOADS
from launcher.backends.kubernetes.pod_logs import LogFilter, read_agent_logs, read_logs
from launcher.errors import EnvironmentProblem

JOB = {"kind": "jobs.batch", "name": "tiny", "namespace": "ml"}
INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True, kw_only=True)
class Answers(Kubectl):
    """A cluster with one run: its workload, and what each of its pods has printed."""

    workload: dict[str, Any] | None = None
    pods: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)

    def run(self, *words: str, **_: Any) -> str:
        verb, *options, pod = words
        assert verb == "logs"
        lines = self.logs[pod.removeprefix("pod/")].splitlines(keepends=True)
        tail = [int(word.removeprefix("--tail=")) for word in options]
        return "".join(lines[-tail[0] :] if tail else lines)

    def find(self, what: str) -> Any | None:
        assert what == "jobs.batch/tiny"
        return self.workload

    def get(self, *words: str) -> Any:
        wanted = dict(pair.split("=") for pair in words[1].removeprefix("--selector=").split(","))
        return {"items": [pod for pod in self.pods if wanted.items() <= pod["metadata"]["labels"].items()]}


def pod(name: str, index: int, *, at: int = 0, **status: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/instance": "tiny", INDEX: str(index)}
    return {
        "metadata": {"name": name, "labels": labels, "creationTimestamp": f"2026-01-01T12:00:0{at}Z"},
        "spec": {"nodeName": f"machine{index}"},
        "status": {"phase": "Running", **status},
    }


FIRST = "plan made\nnode0:0 | step 1/9\nnode1:1 | hello\nnode0:0 | step 2/9\nnode1 | agent says\n"
REPLACED = "plan made again\nnode0:0 | step 3/9"
PODS = [pod("b", 0, at=2), pod("a", 0, at=1, phase="Failed"), pod("c", 1)]
LOGS = {"a": FIRST, "b": REPLACED, "c": "connected\n"}


def run_of(**cluster: Any) -> ClusterRun:
    kubectl = Answers(namespace="ml", context=None, **cluster)
    return ClusterRun(kubectl=kubectl, kind=WORKLOADS["indexed_job"], job="tiny")


@pytest.mark.parametrize(
    ("wanted", "last", "lines"),
    [
        (LogFilter(), None, [*FIRST.splitlines(), *REPLACED.splitlines()]),
        (LogFilter(rank=0), None, ["node0:0 | step 1/9", "node0:0 | step 2/9", "node0:0 | step 3/9"]),
        (LogFilter(host="node1"), None, ["node1:1 | hello"]),
        (LogFilter(rank=0, host="node1"), None, []),
        (LogFilter(rank=0), 1, ["node0:0 | step 2/9", "node0:0 | step 3/9"]),
        (LogFilter(), 1, ["node1:1 | hello", "node0:0 | step 2/9", "node1 | agent says", *REPLACED.splitlines()]),
        (LogFilter(), 0, []),
    ],
)
def test_the_first_pod_and_the_one_before_it_print_the_lines_of_ranks(
    wanted: LogFilter, last: int | None, lines: list[str]
) -> None:
    assert list(read_logs(run_of(pods=PODS, logs=LOGS), wanted, last=last)) == lines


def test_the_session_and_the_other_pods_print_what_agents_say() -> None:
    run = run_of(pods=PODS, logs=LOGS)
    assert list(read_agent_logs(run, host="node1")) == ["node1:agent | connected"]
    assert list(read_agent_logs(run, host="node0", last=1)) == [
        "node0:agent | node1 | agent says",
        "node0:agent | plan made again",
    ]


@pytest.mark.parametrize(
    ("workload", "why"),
    [
        (None, "it was deleted, or the cluster removed it after backend.ttl_s"),
        ({"spec": {"suspend": True}}, "its queue has not admitted it yet"),
        ({"spec": {}}, "the cluster has not created any yet, or they are deleted"),
    ],
)
def test_without_pods_the_reason_is_said(workload: dict[str, Any] | None, why: str) -> None:
    with pytest.raises(EnvironmentProblem, match=f"^tiny has no pods in the namespace ml: {why}$"):
        list(read_logs(run_of(workload=workload), LogFilter()))


def state_of(monkeypatch: pytest.MonkeyPatch, **cluster: Any) -> dict[str, Any]:
    monkeypatch.setattr(module, "Kubectl", lambda **words: Answers(**words, **cluster))
    return read_cluster_state(JOB)


def test_the_state_has_pods_phases_and_the_last_line_of_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    pulling = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    pods = [
        pod("a", 0),
        pod("b", 1, phase="Failed", containerStatuses=[{"state": killed}]),
        pod("c", 2, phase="Pending", containerStatuses=[{"state": pulling}]),
    ]
    state = state_of(monkeypatch, workload={"spec": {}}, pods=pods, logs={"a": FIRST})
    assert state["status"] == "running"
    assert [(each["host"], each["phase"], each["node"], each["said"]) for each in state["pods"]] == [
        ("node0", "Running", "machine0", ""),
        ("node1", "Failed", "machine1", "the pod b ended with exit code 137 (OOMKilled)"),
        ("node2", "Pending", "machine2", "ImagePullBackOff: no such image"),
    ]
    assert state["ranks"] == [
        {"host": "node0", "rank": 0, "line": "step 2/9"},
        {"host": "node1", "rank": 1, "line": "hello"},
    ]


@pytest.mark.parametrize(
    ("workload", "status", "said"),
    [
        (None, "deleted", ""),
        ({"spec": {"suspend": True}}, "suspended", ""),
        ({"spec": {"runPolicy": {"suspend": True}}}, "suspended", ""),
        ({"status": {"conditions": [{"type": "Complete", "status": "True"}]}}, "completed", ""),
        (
            {"status": {"conditions": [{"type": "Failed", "status": "True", "message": "too many"}]}},
            "failed",
            "too many",
        ),
        ({"status": {"conditions": [{"type": "Failed", "status": "False", "message": "no"}]}}, "running", ""),
    ],
)
def test_the_state_of_a_workload(
    monkeypatch: pytest.MonkeyPatch, workload: dict[str, Any] | None, status: str, said: str
) -> None:
    state = state_of(monkeypatch, workload=workload)
    assert (state["status"], state["said"]) == (status, said)


def test_a_cluster_that_cannot_be_asked_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: str, **__: Any) -> str:
        raise EnvironmentProblem("kubectl is not installed")

    monkeypatch.setattr(Kubectl, "run", missing)
    state = read_cluster_state(JOB)
    assert (state["status"], state["said"], state["pods"]) == ("unknown", "kubectl is not installed", [])
    assert "not jobs.batch, jobsets" in read_cluster_state({**JOB, "kind": "pods"})["said"]


def test_pods_of_a_pytorchjob_have_the_names_of_the_plan() -> None:
    def labelled(**labels: str) -> Any:
        return {
            "metadata": {"labels": {f"training.kubeflow.org/replica-{name}": text for name, text in labels.items()}}
        }

    assert host_of(labelled(type="master", index="0")) == "node0"
    assert host_of(labelled(type="worker", index="2")) == "node3"
    assert host_of(labelled()) == ""
