"""``launch deploy apply|status|delete DIR`` by the real kubectl, before an API server in memory."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launcher.deploy import cluster
from launcher.deploy.folder import write
from tests.conftest import Launch
from tests.deploy.conftest import Render, manifests_of
from tests.deploy.kubernetes.api_server import RESOURCES, ApiServer, serving
from tests.deploy.kubernetes.test_manifests import CASES

VENV = str(Path(sys.executable).parent)
needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None and shutil.which("kubectl", path=VENV) is None,
    reason="kubectl is not installed (scripts/lab/kubernetes_tools.py gets it)",
)


def configure(folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make kubectl talk to ``address``."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": address}}],
        "contexts": [{"name": "test", "context": {"cluster": "test"}}],
        "current-context": "test",
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
    monkeypatch.setenv("HOME", str(folder))  # where kubectl caches what it discovers
    monkeypatch.setenv("PATH", VENV, prepend=":")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with serving() as server:
        configure(tmp_path, server.address, monkeypatch)
        yield server


@needs_kubectl
def test_a_folder_is_applied_shown_compared_and_deleted(
    launch_in_process: Launch, rendered: Render, api: ApiServer, tmp_path: Path
) -> None:
    folder = tmp_path / "k8s"
    write(folder, rendered("deploy.name=chat", "deploy.replicas=2")[2])
    applied = launch_in_process("deploy", "apply", str(folder)).expect(0)
    assert "deployment/chat-v1 serves in default" in applied.stdout
    first = next(n for n, each in enumerate(api.writes) if not each.startswith("dry"))
    assert {each.removeprefix("dry ") for each in api.writes[:first]} == set(
        api.writes[first:]
    )  # all are checked first
    assert {kind for kind, _ in api.objects} == {
        *("serviceaccounts", "configmaps", "services", "networkpolicies", "poddisruptionbudgets", "deployments")
    }
    shown = launch_in_process("deploy", "status", str(folder)).expect(0).stdout
    assert shown.splitlines()[1].split()[:3] == ["deployment/chat-v1", "v1", "2/2"]
    launch_in_process("deploy", "apply", str(folder), "--diff").expect(0)
    write(folder, rendered("deploy.name=chat", "deploy.replicas=3")[2])
    changed = launch_in_process("deploy", "apply", str(folder), "--diff").expect(1).stdout
    assert "-  replicas: 2" in changed
    assert "+  replicas: 3" in changed
    launch_in_process("deploy", "delete", str(folder)).expect(0)
    assert api.objects == {}


EVERY_KIND = {
    "istio, KEDA": (
        *("deploy.traffic=istio", "deploy.gateway=istio-system/main", "deploy.hostnames=[models.example.org]"),
        *("deploy.autoscaling=keda", "deploy.prometheus=http://prometheus:9090", "deploy.monitoring=true"),
    ),
    "gateway, HPA": (
        *("deploy.traffic=gateway", "deploy.gateway=main", "deploy.hostnames=[models.example.org]"),
        *("deploy.autoscaling=hpa", "deploy.monitoring=true", "deploy.workload=stateful_set"),
    ),
}


@needs_kubectl
@pytest.mark.parametrize("case", EVERY_KIND)
def test_each_object_is_applied_compared_and_deleted(
    launch_in_process: Launch, rendered: Render, api: ApiServer, tmp_path: Path, case: str
) -> None:
    folder = tmp_path / "k8s"
    write(folder, rendered("deploy.name=chat", *EVERY_KIND[case])[2])
    manifests = {path: yaml.safe_load(path.read_text()) for path in (folder / "manifests").iterdir()}
    launch_in_process("deploy", "apply", str(folder)).expect(0)
    names = {(each["kind"], each["metadata"]["name"]) for each in manifests.values()}
    assert {(each["kind"], name) for (_, name), each in api.objects.items()} == names
    launch_in_process("deploy", "apply", str(folder), "--diff").expect(0)
    for number, (path, manifest) in enumerate(manifests.items()):
        manifest["metadata"]["annotations"] = {**manifest["metadata"].get("annotations", {}), "note": f"n{number}"}
        path.write_text(yaml.safe_dump(manifest))
    changed = launch_in_process("deploy", "apply", str(folder), "--diff").expect(1).stdout
    assert [n for n in range(len(manifests)) if f"+    note: n{n}\n" not in changed] == []
    launch_in_process("deploy", "apply", str(folder)).expect(0)
    launch_in_process("deploy", "delete", str(folder)).expect(0)
    assert api.objects == {}


def test_the_server_of_these_tests_has_every_kind_that_is_rendered(rendered: Render) -> None:
    of_server = {kind for kinds in RESOURCES.values() for kind in kinds.values()} - {"Pod"}
    words = [*CASES.values(), *EVERY_KIND.values()]
    applied = {kind for case in EVERY_KIND.values() for kind in manifests_of(rendered(*case)[2])}
    assert {kind for each in words for kind in manifests_of(rendered(*each)[2])} == applied == of_server


@needs_kubectl
def test_one_object_that_is_refused_leaves_all_as_they_were(
    launch_in_process: Launch, rendered: Render, api: ApiServer, tmp_path: Path
) -> None:
    folder = tmp_path / "k8s"
    write(folder, rendered()[2])
    service = next((folder / "manifests").glob("service-*.yaml"))
    service.write_text(service.read_text().replace("targetPort", "targtPort"))
    refused = launch_in_process("deploy", "apply", str(folder)).expect(2)
    assert "targtPort" in refused.stderr
    assert api.objects == {}


@needs_kubectl
def test_new_pods_that_do_not_get_ready_are_taken_back(
    launch_in_process: Launch, rendered: Render, api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_SLACK_S", 1.0)
    monkeypatch.setattr("launcher.config.deploy.kubernetes._LEAST_START_S", 0)
    folder = tmp_path / "k8s"
    write(folder, rendered("deploy.name=chat", "deploy.load_s=0.1")[2])
    launch_in_process("deploy", "apply", str(folder)).expect(0)
    api.are_ready = False
    write(folder, rendered("deploy.name=chat", "deploy.load_s=0.1", "deploy.replicas=2")[2])
    undone: list[tuple[str, ...]] = []
    run = cluster.Kubectl.run

    def recorded(self: cluster.Kubectl, *words: str, **keywords: object) -> str:
        if words[:2] == ("rollout", "undo"):
            undone.append(words)  # the revisions are ReplicaSets, which this server does not keep
            return ""
        return run(self, *words, **keywords)

    monkeypatch.setattr(cluster.Kubectl, "run", recorded)
    failed = launch_in_process("deploy", "apply", str(folder)).expect(2)
    assert "deployment/chat-v1 goes back to the revision before" in failed.stderr
    assert undone == [("rollout", "undo", "deployment/chat-v1")]


@needs_kubectl
def test_without_a_cluster_nothing_changes_and_the_remedy_is_named(
    launch_in_process: Launch, rendered: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(tmp_path, "http://127.0.0.1:1", monkeypatch)
    folder = tmp_path / "k8s"
    write(folder, rendered()[2])
    for action in ("apply", "status", "delete"):
        failed = launch_in_process("deploy", action, str(folder)).expect(2)
        assert failed.stderr.count("refused") == 1, failed.stderr
        assert "check that this is the right cluster (deploy.context)" in failed.stderr


@needs_kubectl
def test_what_a_baseline_shares_is_not_deleted(
    launch_in_process: Launch, rendered: Render, api: ApiServer, tmp_path: Path
) -> None:
    routes = ("deploy.traffic=istio", "deploy.gateway=a/b", "deploy.hostnames=[m.example.org]")
    old, new = tmp_path / "old", tmp_path / "new"
    write(old, rendered("deploy.name=chat", *routes)[2])
    canary = ("deploy.version=v2", "deploy.baseline=v1", "deploy.weights={v1: 90, v2: 10}")
    write(new, rendered("deploy.name=chat", *routes, *canary)[2])
    for folder in (old, new):
        launch_in_process("deploy", "apply", str(folder)).expect(0)
    assert {name for kind, name in api.objects if kind == "deployments"} == {"chat-v1", "chat-v2"}
    assert "chat-v2 gets 10 %" in launch_in_process("deploy", "delete", str(new)).expect(2).stderr
    launch_in_process("deploy", "rollback", str(new)).expect(0)
    launch_in_process("deploy", "delete", str(new)).expect(0)
    left = {name for _, name in api.objects if not name.startswith("chat-v1")}
    assert left == {"chat"}
    assert ("deployments", "chat-v1") in api.objects


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("apply",), "deploy apply: takes one folder"),
        (("apply", "a", "b"), "write launch deploy apply DIR"),
        (("status", "nowhere"), "DIR=nowhere: holds no run.yaml"),
        (("delete", "nowhere", "--diff"), "--diff: launch deploy delete renders and applies nothing"),
    ],
)
def test_wrong_words(launch_in_process: Launch, words: tuple[str, ...], message: str) -> None:
    assert message in launch_in_process("deploy", *words).expect(2).stderr


def test_a_folder_for_no_cluster_is_refused(launch_in_process: Launch, tmp_path: Path) -> None:
    launch_in_process("deploy", "job=serve", "tracker=local", "deploy=nginx", f"deploy.out={tmp_path}/n").expect(0)
    refused = launch_in_process("deploy", "apply", f"{tmp_path}/n").expect(2)
    assert "holds deploy=nginx, which no cluster takes" in refused.stderr
