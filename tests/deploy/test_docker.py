"""``deploy=docker``: what the image is built from. Building it: test_image.py."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from launcher.config.backend.kubernetes import KubernetesBackend
from launcher.config.snapshot import load_run
from launcher.deploy.docker import _quoted
from launcher.deploy.folder import difference, write
from launcher.deploy.packages import bill_of_materials, needed_packages, program_wheel
from launcher.deploy.prepare import prepare
from launcher.deploy.registry import render
from launcher.errors import ConfigErrors
from tests.deploy.proxies import SERVER

GOLDEN = Path(__file__).parent.parent / "golden/deploy/Containerfile"
IMAGE = "deploy.image=registry.example/launcher:1"
EVERYTHING = (
    "deploy.torch_build=cu128",
    "deploy.gpus=1",
    "job.engine=paged",
    "deploy.cpus=8",
    "deploy.memory=32Gi",
    "deploy.base_image=python@sha256:" + "0" * 64,
    "deploy.run_as_user=1234",
    "deploy.host='::1'",
    "deploy.name=chat",
    "job.api_keys_file='/etc/my keys'",
    "job.tokenizer=/models/to$HOME",
    "job.drain_s=45",
    "job.port=8123",
)


def rendered(*words: str) -> dict[str, Any]:
    """Return the files of an image."""
    return dict(render(*prepare([*SERVER, "deploy=docker", IMAGE, "deploy.out=x", *words])))


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    """All files with every option."""
    return rendered(*EVERYTHING)


def test_the_file_is_as_reviewed(everything: dict[str, Any]) -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(everything["Containerfile"])
    assert everything["Containerfile"] == GOLDEN.read_text()


def test_hadolint_finds_nothing(everything: dict[str, Any], tmp_path: Path) -> None:
    for name, text in (("good", everything["Containerfile"]), ("bad", "FROM debian\nRUN apt-get install x\n")):
        (tmp_path / name).write_text(text)
        found = subprocess.run(
            [Path(sys.executable).with_name("hadolint"), tmp_path / name], capture_output=True, text=True, check=False
        )
        assert (found.returncode == 0) == (name == "good"), found.stdout  # so it looks


def test_everything_that_is_copied_is_rendered_and_nothing_else_is_sent(everything: dict[str, Any]) -> None:
    copied = re.findall(r"^COPY (?!--from)(\S+) ", everything["Containerfile"], re.MULTILINE)
    assert len(copied) == 4
    assert all(any(file == each or file.startswith(f"{each}/") for file in everything) for each in copied)
    first, *allowed = everything[".dockerignore"].splitlines()
    assert first == "*"
    assert {each.lstrip("!").rstrip("/") for each in allowed} == set(copied)


def test_the_run_in_it_is_a_servers(everything: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(everything["server/run.yaml"])
    run = load_run(tmp_path / "run.yaml")
    job: Any = run.job
    assert (run.deploy.kind, run.run.root, job.host, job.port) == ("none", "/runs", "0.0.0.0", 8123)


def test_a_path_cannot_leave_its_comment() -> None:
    assert not re.search(
        r"^RUN touch", rendered("job.tokenizer='/models/x\nRUN touch /bad'")["Containerfile"], re.MULTILINE
    )


def test_a_name_cannot_leave_its_label() -> None:
    assert "\n" not in _quoted("a\nRUN touch /bad")
    assert _quoted('a "$b"') == r'"a \"\$b\""'


def test_versions_are_those_that_run_here() -> None:
    packages = needed_packages(("serve",))
    names = [each.name for each in packages]
    assert names == sorted(names)
    assert {"torch", "fastapi", "starlette", "hydra-core", "antlr4-python3-runtime"} <= set(names), "and what they need"
    assert not {"launcher", "pytest", "torchao", "mlflow-skinny"} & set(names)
    for each in packages:
        assert importlib.metadata.version(each.name).partition("+")[0] == each.version
    assert "torchao" in {each.name for each in needed_packages(("serve", "quantize"))}


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (("model=gpt2_tiny", "job.engine=paged", "model.quantization=int8_weight"), "torchao"),
        (("tracker=tensorboard",), "tensorboard"),
        ((), None),
    ],
)
def test_what_the_run_needs_is_installed(words: tuple[str, ...], package: str | None) -> None:
    names = {line.partition("==")[0] for line in rendered(*words)["requirements.txt"].splitlines()}
    assert names & {"torchao", "tensorboard"} == ({package} if package else set())


def test_the_bill_of_materials_is_one(everything: dict[str, Any]) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(everything["sbom.cdx.json"]) is None
    assert validator.validate_str(json.dumps({**json.loads(everything["sbom.cdx.json"]), "bad": 1})) is not None
    tree = bill_of_materials(needed_packages(("serve",)), version="1")
    pins = {line.strip() for line in everything["requirements.txt"].splitlines()}
    assert {f"{each['name']}=={each['version']}" for each in tree["components"]} <= pins


def test_the_wheel_is_the_program_that_runs_here(tmp_path: Path) -> None:
    name, data = program_wheel()
    assert program_wheel() == (name, data), "equal files give equal bytes"
    (tmp_path / name).write_bytes(data)
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, tmp_path / name]
    subprocess.run(pip, check=True)
    words = [sys.executable, "-S", "-m", "launcher", "--help"]
    paths = os.pathsep.join([str(target), *[path for path in sys.path if "site-packages" in path]])
    ran = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert "launch" in ran.stdout, ran.stderr
    assert (target / "launcher/conf/config.yaml").is_file()
    with zipfile.ZipFile(BytesIO(data)) as archive:
        assert not [each for each in archive.namelist() if "__pycache__" in each]


def test_the_wheel_and_the_path_of_the_image_start_pods_of_runs(everything: dict[str, Any]) -> None:
    """backend=kubernetes runs ``python -m launcher.backends.kubernetes.entrypoint`` in it, as user 1000."""
    (wheel,) = (data for name, data in everything.items() if name.endswith(".whl"))
    assert "launcher/backends/kubernetes/entrypoint.py" in zipfile.ZipFile(BytesIO(wheel)).namelist()
    variables = dict(re.findall(r'(\w+)="(.*)"', everything["Containerfile"]))
    assert variables["PATH"].split(":")[0] == "/opt/launcher/bin"
    backend = KubernetesBackend(image="launcher")
    assert (backend.python, backend.run_as_user) == ("python", 1000)
    assert "\nUSER 1000:1000\n" in rendered()["Containerfile"]


def test_folders_hold_bytes_as_they_hold_texts(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"a": "text\n", "b": b"\x00\xff"}
    assert "b differ" in difference(tmp_path, files)
    assert write(tmp_path, files).changed == ("a", "b")
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert difference(tmp_path, files) == ""
    assert write(tmp_path, files).changed == ()
    (tmp_path / "b").write_bytes(b"mine")
    with pytest.raises(ConfigErrors, match="was changed since it was written"):
        write(tmp_path, files)


def test_the_command_of_the_page(launch_in_process: Any, tmp_path: Path) -> None:
    words = ("deploy=docker", "deploy.out=image", "deploy.image=registry/team/launcher:1")
    launch_in_process("deploy", "+exp=serve_smollm2", *words).expect(0)
    built = (tmp_path / "image/Containerfile").read_text()
    assert "podman build" in built
    assert (tmp_path / "image" / program_wheel()[0]).is_file()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["deploy.torch_build=gpu"], "deploy.torch_build"),
        (["deploy.gpus=1"], "deploy.torch_build"),
        (["deploy.run_as_user=0"], "deploy.run_as_user"),
        (["deploy.base_image='a b'"], "deploy.base_image"),
        (["job.port=80"], "job.port"),
        (["job.engine=vllm"], "job.engine"),
        (["job.tokenizer=./mine"], "job.tokenizer"),
    ],
)
def test_what_cannot_be_built_is_refused_by_its_option(words: list[str], option: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        rendered(*words)
    assert option in [error.option for error in caught.value.errors], caught.value
