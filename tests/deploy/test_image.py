"""The image of ``deploy=docker`` is built by buildah and serves: ``scripts/test -m image``, some minutes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launcher.config.data.bpe import train_byte_level_bpe
from launcher.deploy.folder import write
from launcher.deploy.prepare import prepare
from launcher.deploy.registry import render
from tests.helpers import wait_for
from tests.ports import free_port
from tests.processes import kill_marked, marked, marked_environment, new_mark

_PROGRAMS = ("buildah", "debootstrap")
_BASE = "localhost/launcher-test-base:1"
_PACKAGES = "python3,python3-venv,ca-certificates"
_CERTIFICATES = "/etc/ssl/certs"


def buildah(*words: str) -> str:
    """Run buildah; return what it prints."""
    ended = subprocess.run(["buildah", *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make an image of Debian with Python: no registry of images is asked."""
    for program in _PROGRAMS:
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"{program} is not installed: apt-get install {program}")
    if os.geteuid() != 0:
        pytest.skip("debootstrap needs root")
    if not buildah("images", "--noheading", "--filter", f"reference={_BASE}"):
        root = tmp_path_factory.mktemp("root")
        command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(root)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        container = buildah("from", "scratch").strip()
        buildah("add", "--quiet", container, str(root), "/")
        buildah("commit", "--quiet", "--rm", container, _BASE)
        shutil.rmtree(root)
    return _BASE


def local_sources() -> list[str]:
    """Return options with which a build finds packages where pip on this machine does."""
    pip = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
    folders = {word for found in re.findall(r"find-links='(.*)'", lines) for word in found.split() if word[0] == "/"}
    bundle = f"{_CERTIFICATES}/ca-certificates.crt"
    return [
        *(f"--volume={folder}:{folder}:ro" for folder in sorted(folders)),
        *(f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro", f"--env=SSL_CERT_FILE={bundle}", f"--env=PIP_CERT={bundle}"),
        *(["--build-arg", "TORCH_FROM=" + " ".join(f"--find-links={each}" for each in folders)] if folders else []),
    ]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny random model with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_byte_level_bpe(["a text to learn tokens from"], vocab_size=280)
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # for the user in the container
    return folder


@pytest.fixture(scope="module")
def image(base: str, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Build the image of a server of a tiny model; return its name and the server's port."""
    folder, port, name = tmp_path_factory.mktemp("image"), free_port(), "localhost/launcher-test:1"
    words = [
        *("job=serve", "model=hf", f"model.name={tiny_llama}", "precision=fp32", "tracker=local", f"job.port={port}"),
        *("deploy=docker", f"deploy.out={folder}", f"deploy.image={name}", f"deploy.base_image={base}"),
    ]
    write(folder, render(*prepare(words)))
    file = ("--file", str(folder / "Containerfile"), "--tag", name, str(folder))
    buildah("build", "--isolation=chroot", "--format=docker", *local_sources(), *file)
    yield name, port
    buildah("rmi", name)


@pytest.mark.timeout(1800)  # it downloads and installs torch
def test_it_serves_as_a_user_without_rights(image: tuple[str, int], tiny_llama: Path) -> None:
    name, port = image
    container = buildah("from", name).strip()
    mark = new_mark()
    mounts = [f"--volume={tiny_llama}:{tiny_llama}:ro"]
    described = json.loads(buildah("inspect", "--type=image", name))["Docker"]["config"]
    assert described["User"] == "1000:1000"
    assert described["Labels"]["launcher.torch"] == "cpu"
    run = ["buildah", "run", "--isolation=chroot", f"--env=LAUNCHER_TEST_MARK={mark}", *mounts, container, "--"]
    server = subprocess.Popen([*run, *described["Cmd"]], env=marked_environment(mark))
    try:
        url = f"http://127.0.0.1:{port}"

        def is_ready() -> bool:
            try:
                return httpx.get(f"{url}/health/ready").is_success
            except httpx.TransportError:
                return False

        wait_for(is_ready, seconds=300, process=server)
        body = {"model": tiny_llama.name, "prompt": "a", "max_tokens": 4, "temperature": 0}
        answered = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answered.is_success, answered.text
        assert answered.json()["usage"]["completion_tokens"] == 4
        users = {process.uids().effective for process in marked(mark) if "launcher" in " ".join(process.cmdline()[:4])}
        assert 0 not in {process.uids().effective for process in marked(mark) if process.name().startswith("python")}
        assert users, "the server's processes were seen"
        check = described["Healthcheck"]["Test"]
        assert check[0] == "CMD"
        buildah("run", "--isolation=chroot", container, "--", *check[1:])
    finally:
        kill_marked(mark)
        server.wait()
        buildah("rm", container)
