"""The chart: helm accepts it, and prints with its values exactly the manifests of ``deploy=kubernetes``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launcher.config.deploy.helm import VALUES, HelmDeploy
from launcher.config.kubernetes_objects import validate_image
from launcher.deploy.folder import write
from launcher.errors import ConfigErrors
from tests.deploy.conftest import Render
from tests.deploy.kubernetes.test_manifests import CASES, HOSTS, KEDA

HELM = shutil.which("helm", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
needs_helm = pytest.mark.skipif(HELM is None, reason="helm is not installed (scripts/lab/kubernetes_tools.py gets it)")
CHARTS = {
    **{name: words for name, words in CASES.items() if name in ("smallest", "hpa", "keda", "stateful")},
    "everything": (
        *("deploy.node_selector={gpu: h100}", "deploy.image_pull_secrets=[registry, other]", "deploy.memory=64Gi"),
        *("deploy.tolerations=[{key: a, operator: Exists}]", "deploy.model_from=object_store", "deploy.replicas=3"),
        *(
            "deploy.model_source=s3://models/x",
            "deploy.traffic=gateway",
            "deploy.gateway=a/b",
            "backend.env={A: '{{ b }}'}",
        ),
    ),
}


def helm(*words: str) -> subprocess.CompletedProcess[str]:
    assert HELM is not None
    return subprocess.run([HELM, *words], capture_output=True, text=True, timeout=60, check=False)


def by_name(texts: list[str]) -> dict[tuple[str, str], Any]:
    found = [document for text in texts for document in yaml.safe_load_all(text) if document is not None]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


@needs_helm
@pytest.mark.parametrize("case", CHARTS)
def test_helm_accepts_it_and_prints_the_manifests(rendered: Render, tmp_path: Path, case: str) -> None:
    direct = rendered(*CHARTS[case])[2]
    write(tmp_path, rendered(*CHARTS[case], kind="helm")[2])
    linted = helm("lint", "--strict", str(tmp_path / "chart"))
    assert linted.returncode == 0, linted.stdout
    printed = helm("template", "release", str(tmp_path / "chart"))
    assert printed.returncode == 0, printed.stderr
    wanted = by_name([text for path, text in direct.items() if path.startswith("manifests/")])
    assert by_name([printed.stdout]) == wanted


@needs_helm
def test_values_change_the_manifests_and_wrong_ones_are_refused(rendered: Render, tmp_path: Path) -> None:
    write(tmp_path, rendered(kind="helm")[2])
    chart = str(tmp_path / "chart")
    changed = helm(
        "template", "x", chart, "--set", "replicas=3,image=other:2,node_selector.gpu=a", "--set", "memory=9Gi"
    )
    spec = next(each for (kind, _), each in by_name([changed.stdout]).items() if kind == "Deployment")["spec"]
    pod = spec["template"]["spec"]
    assert (spec["replicas"], pod["containers"][0]["image"], pod["nodeSelector"]) == (3, "other:2", {"gpu": "a"})
    assert pod["containers"][0]["resources"]["limits"]["memory"] == "9Gi"
    for wrong in (
        "replicas=0",
        "replicas=many",
        "memory=lots",
        "replcas=2",
        "service_port=70000",
        "memory=1Mi",
        "image=",
    ):
        refused = helm("template", "x", chart, "--set", wrong)
        assert refused.returncode != 0, wrong
        assert wrong.partition("=")[0] in refused.stderr
    write(tmp_path, rendered("deploy.autoscaling=hpa", kind="helm")[2])
    assert helm("template", "x", chart, "--set", "min_replicas=4").returncode == 0
    refused = helm("template", "x", chart, "--set", "min_replicas=9")
    assert "min_replicas=9 is more than max_replicas=4" in refused.stderr


@needs_helm
@pytest.mark.parametrize("namespace", ["ml", "123"])
def test_a_release_in_another_namespace_is_the_manifests_of_that_namespace(
    rendered: Render, tmp_path: Path, namespace: str
) -> None:
    words = ("deploy.name=chat", *KEDA, "deploy.monitoring=true", "deploy.traffic=istio", *HOSTS)
    direct = rendered(*words, f"deploy.namespace={namespace}")[2]
    write(tmp_path, rendered(*words, kind="helm")[2])
    printed = helm("template", "release", str(tmp_path / "chart"), "--namespace", namespace)
    assert printed.returncode == 0, printed.stderr
    wanted = by_name([text for path, text in direct.items() if path.startswith("manifests/")])
    found = by_name([printed.stdout])
    for manifests in (wanted, found):  # the hash in names is that of the run as it was rendered
        (config,) = (key for key, each in manifests.items() if each.get("immutable"))
        run_hash = manifests[config]["metadata"]["annotations"]["launcher/run-hash"]
        text = json.dumps([[*key, each] for key, each in sorted(manifests.items())])
        text = text.replace(run_hash, "HASH").replace(run_hash[:10], "HASH")
        manifests.clear()
        manifests.update({(kind, name): each for kind, name, each in json.loads(text)})
    assert found == wanted


def test_templates_fix_no_namespace(rendered: Render) -> None:
    words = ("deploy.namespace=team-a", *CASES["keda"], "deploy.monitoring=true")
    files = rendered(*words, kind="helm")[2]
    templates = {path: str(text) for path, text in files.items() if path.startswith("chart/")}
    assert [path for path, text in templates.items() if "team-a" in text or "namespace-of-the" in text] == []
    assert sum("namespace: {{ .Release.Namespace | toJson }}" in text for text in templates.values()) >= 8
    assert "chat.{{ .Release.Namespace }}.svc" in "".join(templates.values()).replace("gpt2-tiny", "chat")


def test_the_schema_is_that_of_the_options(rendered: Render) -> None:
    files = rendered("deploy.autoscaling=hpa", kind="helm")[2]
    values, schema = yaml.safe_load(files["chart/values.yaml"]), json.loads(files["chart/values.schema.json"])
    jsonschema.Draft202012Validator.check_schema(schema)
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(values)) == []
    assert schema["properties"].keys() == values.keys() <= {each.name for each in fields(HelmDeploy)}
    assert set(VALUES) - values.keys() == {"replicas"}  # which the autoscaler sets
    wrong = {
        "max_replicas": 0,
        "min_replicas": 0,
        "other": 1,
        "image": "",
        "memory": "1.5Gi",
        "service_port": 0,
        "image_pull_secrets": ["A b"],
        "node_selector": {"a b": "c"},
        "tolerations": [{"efect": "NoSchedule"}],
    }
    for name, value in wrong.items():
        assert list(jsonschema.Draft202012Validator(schema).iter_errors({**values, name: value})), name
    for image in ("UPPER/x:1", "a b", "user:secret@registry/x:1", "r/x:"):
        errors = jsonschema.Draft202012Validator(schema).iter_errors({**values, "image": image})
        assert bool(list(errors)) != (not list(validate_image("image", image, logins=""))), image
    for image in ("r:5000/team/x:1.2_3", f"x@sha256:{'0' * 64}", "LOCALHOST/x"):
        assert not list(jsonschema.Draft202012Validator(schema).iter_errors({**values, "image": image})), image


def test_a_release_has_one_version(rendered: Render) -> None:
    words = ("deploy.traffic=gateway", "deploy.gateway=a/b", "deploy.baseline=v0")
    with pytest.raises(ConfigErrors, match=r"deploy\.baseline=v0.*deploy=kubernetes"):
        rendered(*words, kind="helm")
