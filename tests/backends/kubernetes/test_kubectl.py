"""What kubectl says, and what we make of it."""

import shlex
import sys

import pytest

from launcher.backends.kubernetes import pod_logs as module
from launcher.backends.kubernetes.cluster_run import ClusterRun
from launcher.backends.kubernetes.kubectl import Kubectl
from launcher.backends.kubernetes.manifests import WORKLOADS
from launcher.backends.kubernetes.pod_logs import follow
from launcher.errors import EnvironmentProblem

SAID = (
    ('error: context "far" does not exist', "backend.context"),
    ("Error in configuration: context was not found for specified context: far", "backend.context"),
    ("The connection to the server 127.0.0.1:9 was refused - did you specify the right host or port?", "cluster-info"),
    ("Unable to connect to the server: dial tcp: lookup far: no such host", "cluster-info"),
    ('Error from server (NotFound): namespaces "ml" not found', "backend.namespace"),
    ('no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"', "backend.workload=indexed_job"),
    ('secrets is forbidden: User "me" cannot create resource "secrets"', "auth can-i"),
    ('pods "x" is forbidden: exceeded quota: compute', "backend.memory"),
    ("error: You must be logged in to the server (Unauthorized)", "log in"),
    ("something new", "by hand"),
)


@pytest.mark.parametrize(("said", "remedy"), SAID)
def test_a_refusal_comes_with_a_remedy(tmp_path, monkeypatch, said, remedy):
    program = tmp_path / "kubectl"
    code = shlex.quote(f"import sys; sys.exit({said!r})")
    program.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem) as raised:
        Kubectl(namespace="ml", context="far").run("get", "pods")
    assert str(raised.value).startswith(f"`kubectl --context=far --namespace=ml get pods` failed: {said}; ")
    assert remedy in str(raised.value).removeprefix(said)


class Scripted(Kubectl):
    """A cluster that answers from a list: pods, then the run, again and again."""

    answers: list[object] = []  # noqa: RUF012

    def get(self, *words):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def find(self, what):
        return self.get(what)


def followed(monkeypatch, *answers):
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(Scripted, "answers", list(answers))
    return follow(scripted_run(), arrived=())


def scripted_run():
    return ClusterRun(kubectl=Scripted(namespace="ml", context=None), kind=WORKLOADS["indexed_job"], job="tiny")


def ended(condition):
    return {"status": {"conditions": [{"type": condition, "status": "True"}]}}


def pod(name, **status):
    return {"metadata": {"name": name, "creationTimestamp": "2026-01-01T12:00:00Z"}, "status": status}


def test_it_says_what_pods_wait_for_and_bears_a_cluster_that_is_away(monkeypatch, capsys):
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    first = pod("a", phase="Pending", containerStatuses=[{"state": {"waiting": waiting}}])
    no_room = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    second = pod("a", phase="Pending", conditions=[no_room])
    nothing = {"items": []}
    outcome = followed(
        monkeypatch,
        *({"items": [second]}, {}, {"items": [second]}, {}, EnvironmentProblem("away"), {"items": [first]}, {}),
        *(nothing, ended("Complete")),
    )
    assert (outcome.status, outcome.exit_code) == ("completed", 0)
    assert capsys.readouterr().out.splitlines() == [
        "a: Unschedulable: 0/3 nodes",
        "away",
        "a: ImagePullBackOff: no such image",
    ]


def test_a_cluster_that_stays_away_ends_the_waiting(monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", -1.0)
    with pytest.raises(EnvironmentProblem, match="away"):
        followed(monkeypatch, EnvironmentProblem("away"))


def test_a_run_of_which_no_pod_is_left_has_failed(monkeypatch):
    nothing = {"items": []}
    outcome = followed(monkeypatch, nothing, ended("Failed"), nothing, nothing)
    assert (outcome.status, outcome.exit_code) == ("failed", 255)


def test_the_pod_that_took_the_run_along_is_named(monkeypatch):
    gone = {"terminated": {"exitCode": 137, "reason": "OOMKilled", "message": "step 3"}}
    nothing, culprit = {"items": []}, {"items": [pod("b", containerStatuses=[{"state": gone}])]}
    outcome = followed(monkeypatch, nothing, ended("Failed"), nothing, culprit)
    assert outcome.exit_code == 137
    assert outcome.failure.reason == "the pod b ended with exit code 137 (OOMKilled)"
