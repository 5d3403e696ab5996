"""``launch deploy``: from overrides or a saved run to files; what is refused, and how."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from launcher.backends.kubernetes.kubectl import Kubectl
from launcher.config.compose import compose
from launcher.config.deploy.canary import CanaryDeploy
from launcher.config.run import NoDeploy
from launcher.config.snapshot import load_run, save_run
from launcher.deploy import cluster
from launcher.deploy.canary.split import update_folder, with_share
from launcher.deploy.folder import listed, locked, write
from tests.conftest import Launch
from tests.deploy.conftest import Render

SERVER = ("job=serve", "tracker=local")
KUBERNETES = ("deploy=kubernetes", "deploy.image=registry.example/launcher:1")


def test_a_server_is_rendered_compared_and_written(launch_in_process: Launch, tmp_path: Path) -> None:
    words = ("deploy", *SERVER, *KUBERNETES, f"deploy.out={tmp_path}/k8s")
    assert "kind: Service" in launch_in_process(*words, "--diff").expect(1).stdout
    assert "kind: Service" in launch_in_process(*words, "dry_run=true").expect(0).stdout
    assert not (tmp_path / "k8s").exists()
    assert f"wrote {tmp_path}/k8s/run.yaml" in launch_in_process(*words).expect(0).stdout
    assert launch_in_process(*words, "--diff").expect(0).stdout == "no difference\n"
    other = launch_in_process(*words, "deploy.image=registry.example/launcher:2", "--diff").expect(1)
    assert "+        image: registry.example/launcher:2" in other.stdout


def test_the_snapshot_keeps_the_group_and_that_of_a_container_does_not(
    launch_in_process: Launch, tmp_path: Path
) -> None:
    folder = tmp_path / "k8s"
    launch_in_process("deploy", *SERVER, *KUBERNETES, f"deploy.out={folder}").expect(0)
    kept = load_run(folder / "run.yaml")
    assert (kept.deploy.kind, kept.job.host) == ("kubernetes", "127.0.0.1")
    config = yaml.safe_load((folder / "manifests/configmap.yaml").read_text())
    (tmp_path / "run.yaml").write_text(config["data"]["run.yaml"])
    started = load_run(tmp_path / "run.yaml")
    assert (started.deploy, started.job.host, started.run.root) == (NoDeploy(), "0.0.0.0", "/runs")
    assert "gpt2_tiny.default.svc.cluster.local".replace("_", "-") in started.job.allowed_hosts


def test_a_saved_run_is_deployed_with_changes(launch_in_process: Launch, tmp_path: Path) -> None:
    saved = tmp_path / "runs/gpt2_tiny/20260101-120000-abcd"
    saved.mkdir(parents=True)
    save_run(compose((*SERVER, "job.max_queue=7")).run, saved / "run.yaml")
    (saved / "logs").mkdir()
    line = "serving gpt2_tiny at http://127.0.0.1:8000 after 41.2 s; http://127.0.0.1:8000/ shows its status\n"
    (saved / "logs/here.0.log").write_text(f"loading\n{line}")
    words = ("deploy", str(saved), *KUBERNETES, f"deploy.out={tmp_path}/k8s", "job.port=9000")
    launch_in_process(*words).expect(0)
    run = load_run(tmp_path / "k8s/run.yaml")
    assert (run.job.max_queue, run.job.port, run.deploy.kind, run.deploy.load_s) == (7, 9000, "kubernetes", 41.2)
    assert "deploy.out" in launch_in_process("deploy", str(saved), *KUBERNETES).expect(2).stderr


REFUSED = {
    "nothing to deploy": (SERVER, "deploy=none: there is nothing to render; set deploy=kubernetes"),
    "no folder": ((*SERVER, *KUBERNETES), "deploy.out"),
    "no image": ((*SERVER, "deploy=kubernetes", "deploy.out=x"), "deploy.image"),
    "a list": ((*SERVER, *KUBERNETES, "deploy.out=x", "deploy.canary_steps=[5,50]"), "deploy.canary_steps=[5, 50]"),
    "an unknown kind": ((*SERVER, "deploy=kubernets"), "did you mean kubernetes?"),
    "no server": ((*KUBERNETES, "deploy.out=x"), "job=train: deploy=kubernetes deploys servers"),
    "a port of root": (
        (*SERVER, *KUBERNETES, "deploy.out=x", "job.port=80"),
        "job.port=80: the container does not run",
    ),
    "a bad name": (
        (*SERVER, *KUBERNETES, "deploy.out=x", "deploy.name=My_Model"),
        "deploy.name=My_Model (command line): is not",
    ),
    "a bad namespace": (
        (*SERVER, *KUBERNETES, "deploy.out=x", "deploy.namespace=a.b"),
        "deploy.namespace=a.b (command line): is not",
    ),
    "little memory": ((*SERVER, *KUBERNETES, "deploy.out=x", "deploy.memory=1Gi"), "set deploy.memory="),
    "other hosts": (
        (*SERVER, *KUBERNETES, "deploy.out=x", "backend=kubernetes", "backend.image=x"),
        "backend=kubernetes: a container starts its own ranks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_deployed_is_refused_by_its_option(
    launch_in_process: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = REFUSED[case]
    assert message in launch_in_process("deploy", *words).expect(2).stderr
    assert not any(tmp_path.iterdir())


def test_wrong_words_about_a_folder_are_answered_with_the_right_ones(launch_in_process: Launch, tmp_path: Path) -> None:
    launch_in_process("deploy", *SERVER, *KUBERNETES, f"deploy.out={tmp_path}/k").expect(0)
    folder = f"{tmp_path}/k"
    assert "write launch deploy apply" in launch_in_process("deploy", folder).expect(2).stderr
    assert "did you mean apply?" in launch_in_process("deploy", "aply", folder).expect(2).stderr
    assert "is a file; name the folder" in launch_in_process("deploy", "apply", f"{folder}/run.yaml").expect(2).stderr
    (tmp_path / "k/manifests/configmap.yaml").unlink()
    for action in ("apply", "delete"):
        missing = launch_in_process("deploy", action, folder).expect(2).stderr
        assert "lacks manifests/configmap.yaml" in missing


def test_the_group_has_no_place_in_a_run(launch_in_process: Launch) -> None:
    refused = launch_in_process(*SERVER, *KUBERNETES, "deploy.out=x", "dry_run=true").expect(2)
    assert "deploy=kubernetes: has no effect on a run: launch deploy renders it; type launch deploy" in refused.stderr


def test_only_files_of_the_list_are_in_it(launch_in_process: Launch, tmp_path: Path) -> None:
    launch_in_process("deploy", *SERVER, *KUBERNETES, f"deploy.out={tmp_path}").expect(0)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*listed(tmp_path), "files.json"}


ECHO = (*SERVER, "job.engine=echo", "model=gpt2_tiny")
ROUTED = (*KUBERNETES, "deploy.traffic=istio", "deploy.gateway=a/b", "deploy.hostnames=[m.example.org]")
CANARIES = {
    "haproxy": (
        ("deploy=haproxy", "deploy.admin_socket=/run/a.sock", "deploy.canary_upstreams=[10.0.0.3:8000]"),
        ("deploy.canary_percent=10", "deploy.canary_percent=0"),
    ),
    "kubernetes": (
        (*ROUTED, "deploy.version=v2", "deploy.baseline=v1"),
        ("deploy.weights={v1: 90, v2: 10}", "deploy.weights={v1: 100, v2: 0}"),
    ),
}


@pytest.mark.parametrize("kind", CANARIES)
def test_a_folder_that_is_rendered_again_keeps_its_weights(
    launch_in_process: Launch, tmp_path: Path, kind: str
) -> None:
    words, explicit = CANARIES[kind]
    command = ("deploy", *ECHO, *words, f"deploy.out={tmp_path}")

    def share() -> int:
        deploy = load_run(tmp_path / "run.yaml").deploy
        assert isinstance(deploy, CanaryDeploy)
        return deploy.canary_share

    warned = launch_in_process(*command, explicit[0]).expect(0).stderr
    assert "warning: deploy.canary_prometheus names no Prometheus" in warned
    assert ("deploy.monitoring=false" in warned) == (kind == "kubernetes")
    assert "kept the weights" in launch_in_process(*command).expect(0).stdout
    assert share() == 10
    launch_in_process(*command, explicit[1]).expect(0)
    assert share() == 0
    update_folder(tmp_path, with_share(load_run(tmp_path / "run.yaml"), 100), {})  # as a promotion does
    shown = launch_in_process(*command, "job.max_queue=7").expect(0).stdout
    assert "gets 100 % of the requests" in shown
    assert (share(), load_run(tmp_path / "run.yaml").job.max_queue) == (100, 7)
    for word in explicit:
        refused = launch_in_process(*command, word).expect(2).stderr
        assert "promote or rollback set 100 %" in refused
        assert f"launch deploy promote {tmp_path}" in refused
    assert share() == 100


def test_a_folder_stays_the_deployment_that_it_is(launch_in_process: Launch, tmp_path: Path) -> None:
    command = ("deploy", *ECHO, *KUBERNETES, f"deploy.out={tmp_path}", "deploy.name=chat")
    launch_in_process(*command).expect(0)
    before = listed(tmp_path)
    for words, held in {
        ("deploy.name=other",): "holds deploy.name=chat, and would get deploy.name=other",
        ("deploy.version=v2",): "holds deploy.version=v1, and would get deploy.version=v2",
        ("deploy.namespace=other",): "holds deploy.namespace=default, and would get deploy.namespace=other",
    }.items():
        refused = launch_in_process(*command, *words).expect(2).stderr
        assert held in refused
        assert f"launch deploy delete {tmp_path}" in refused
        assert held in launch_in_process(*command, *words, "--diff").expect(2).stderr
    other = launch_in_process("deploy", *ECHO, "deploy=haproxy", f"deploy.out={tmp_path}").expect(2).stderr
    assert "holds deploy=kubernetes" in other
    assert listed(tmp_path) == before
    launch_in_process(*command, "deploy.context=elsewhere").expect(0)


def test_a_load_balancer_may_stand_before_another_model(launch_in_process: Launch, tmp_path: Path) -> None:
    for name in ("a", "b"):
        launch_in_process("deploy", *ECHO, "deploy=nginx", f"deploy.out={tmp_path}", f"run.name={name}").expect(0)


def test_a_second_promotion_is_refused_with_the_process_of_the_first(launch_in_process: Launch, tmp_path: Path) -> None:
    words, _ = CANARIES["haproxy"]
    command = ("deploy", *ECHO, *words, f"deploy.out={tmp_path}")
    launch_in_process(*command).expect(0)
    with locked(tmp_path, option="DIR"):
        for refused in (launch_in_process("deploy", "promote", str(tmp_path)), launch_in_process(*command)):
            assert f"another launch deploy (process {os.getpid()})" in refused.expect(2).stderr
        assert launch_in_process("deploy", "rollback", str(tmp_path)).expect(2).stderr.count("process") == 0


class _Recorded:
    """kubectl, of which the file names are kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        monkeypatch.setattr(Kubectl, "run", self.run)

    def run(self, *words: str, **_: object) -> str:
        self.files += [word.partition("=")[2] for word in words if word.startswith("--filename=")]
        return '{"items": []}' if words[0] == "get" else ""


def test_kubectl_gets_the_files_of_the_list_alone(
    launch_in_process: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_in_process("deploy", *ECHO, *KUBERNETES, f"deploy.out={tmp_path}").expect(0)
    own = {str(tmp_path / path) for path in listed(tmp_path) if path.startswith("manifests/")}
    (tmp_path / "manifests/mine.yaml").write_text("kind: Namespace\n")
    service = tmp_path / "manifests/deployment.yaml"
    service.write_text(service.read_text() + "# edited\n")
    kubectl = _Recorded(monkeypatch)
    for action in (("apply",), ("apply", "--diff"), ("delete",)):
        kubectl.files.clear()
        shown = launch_in_process("deploy", *action, str(tmp_path)).expect(0)
        assert set(kubectl.files) == own
        assert "mine.yaml was not written by launch deploy, and is left out" in shown.stderr
        assert "deployment.yaml was changed since launch deploy wrote it, and is used as it is" in shown.stderr
    run = tmp_path / "run.yaml"
    run.write_text(run.read_text().replace("namespace: default", "namespace: prod"))
    kubectl.files.clear()
    for action in ("apply", "status", "delete"):
        refused = launch_in_process("deploy", action, str(tmp_path)).expect(2).stderr
        assert "run.yaml, which names cluster and namespace, was changed" in refused
    (tmp_path / "files.json").unlink()
    assert "lacks files.json" in launch_in_process("deploy", "apply", str(tmp_path)).expect(2).stderr
    assert kubectl.files == []


def test_helm_gets_the_files_of_the_list_alone(rendered: Render, tmp_path: Path) -> None:
    files = rendered(kind="helm")[2]
    write(tmp_path / "out", files)
    (tmp_path / "out/chart/templates/mine.yaml").write_text("kind: Namespace\n")
    with cluster.chart_copy(cluster.open_deployment(tmp_path / "out")) as chart:
        found = {f"chart/{path.relative_to(chart)}" for path in Path(chart).rglob("*") if path.is_file()}
    assert found == {path for path in files if path.startswith("chart/")}
