"""What checkov finds in rendered manifests and in the Containerfile: nothing but what is accepted here, with reasons.

checkov needs an environment of its own: ``scripts/check_manifests`` makes one and runs these tests with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.deploy.prepare import prepare
from launcher.deploy.registry import render
from tests.backends.kubernetes.test_manifests import FULL, SMALL, WORKLOADS, rendered
from tests.deploy.kubernetes.test_group import WORDS as GROUP
from tests.deploy.kubernetes.test_manifests import CASES

CHECKOV = os.environ.get("CHECKOV") or shutil.which("checkov")
pytestmark = pytest.mark.skipif(
    CHECKOV is None, reason="checkov is not installed: scripts/check_manifests runs this with it"
)
IMAGE = "registry.example/team/launcher@sha256:" + "0" * 64
SERVER = ("job=serve", "tracker=local", f"deploy.image={IMAGE}", "deploy.out=x")
RUNS = {"small": SMALL, "full": FULL}
ACCEPTED = {
    "CKV2_K8S_6": "the pods of a run have no NetworkPolicy: NCCL and gloo connect on ports of their own choice, and a "
    "namespace knows who scrapes its metrics; those of a server have one",
    "CKV_K8S_35": "tokens are variables (deploy.secret, deploy.keys_from): libraries of the hub and of object stores "
    "read them there; they are in no manifest, and engines do not get the API keys",
    "CKV_K8S_40": "1000 is the user that owns the folders of the image (deploy=docker), and files in shared claims; "
    "deploy.run_as_user sets another",
}
"""Findings that remain, and why."""


def findings(folder: Path) -> dict[str, set[str]]:
    """Return the resources in which each check fails."""
    assert CHECKOV is not None
    words = ("--framework", "kubernetes", "dockerfile", "--compact", "--quiet", "--skip-download", "--output", "json")
    done = subprocess.run([CHECKOV, "--directory", folder, *words], capture_output=True, text=True, check=False)
    reports: Any = json.loads(done.stdout)
    found: dict[str, set[str]] = {}
    for report in reports if isinstance(reports, list) else [reports]:
        assert report["summary"]["parsing_errors"] == 0
        for each in report["results"]["failed_checks"]:
            found.setdefault(each["check_id"], set()).add(f"{each['file_path']} {each['resource']}")
    return found


def test_checkov_finds_nothing_else(tmp_path: Path) -> None:
    for name, words in {**CASES, "group": GROUP}.items():
        for path, text in render(*prepare((*SERVER, "deploy=kubernetes", "deploy.namespace=ml", *words))).items():
            if path.startswith("manifests/"):
                place = tmp_path / "server" / name / path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(str(text))
    for name, words in RUNS.items():
        for workload in WORKLOADS:
            text = rendered(*words, f"backend.image={IMAGE}", "backend.namespace=ml", f"backend.workload={workload}")[1]
            (tmp_path / f"{name}-{workload}.yaml").write_text(text)
    image = render(*prepare((*SERVER, "deploy=docker")))
    (tmp_path / "Dockerfile").write_text(str(image["Containerfile"]))
    found = findings(tmp_path)
    assert {check: found[check] for check in found.keys() - ACCEPTED.keys()} == {}
    assert not [each for each in found["CKV2_K8S_6"] if each.startswith("/server/")]
    assert found.keys() == ACCEPTED.keys(), "what is no longer found is not accepted any more"


def test_checkov_looks(tmp_path: Path) -> None:
    container = {"name": "a", "image": "a", "securityContext": {"privileged": True}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [container]}}
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(pod))
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN sudo true\n")
    assert {"CKV_K8S_16", "CKV_K8S_8", "CKV_K8S_43", "CKV_DOCKER_3", "CKV_DOCKER_7"} <= findings(tmp_path).keys()
