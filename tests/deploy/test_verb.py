"""``launch deploy``: from overrides or a saved run to files; what is refused, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launcher.config.compose import compose
from launcher.config.run import NoDeploy
from launcher.config.snapshot import load_run, save_run
from launcher.deploy.folder import listed
from tests.conftest import Launch

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
