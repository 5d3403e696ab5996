"""A cluster that plays manifests, and kubectl for it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Start
from tests.ports import free_port
from tests.torchless import ECHO, endless

from .cluster import Cluster

NO_NAMESPACES = "pods are played in mount, host name and PID namespaces, which needs root (a privileged container)"


@pytest.fixture
def cluster(tmp_path: Path, preloading: Start) -> Iterator[Cluster]:
    """Play manifests here, with pods whose processes are forked from one that has imported torch."""
    if not has_namespaces():
        pytest.skip(NO_NAMESPACES)
    folder = tmp_path / "cluster"
    folder.mkdir()
    playing = Cluster(folder)
    playing.start_process = preloading
    yield playing
    playing.close()


@pytest.fixture
def kubectl(cluster: Cluster, tmp_path: Path) -> dict[str, str]:
    """Return the environment in which ``kubectl`` talks to the cluster."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "kubectl"
    source = Path(__file__).with_name("kubectl.py").read_text(encoding="utf-8")
    code = folder / "kubectl.py"
    code.write_text(source, encoding="utf-8")
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(code)])} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "TEST_CLUSTER": str(cluster.address)}


@pytest.fixture
def launch_with(
    launch_forked_in_background: Callable[..., object], kubectl: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., object]:
    """Start ``python -m launcher`` in the background, forked, with that kubectl."""
    for name, value in kubectl.items():
        monkeypatch.setenv(name, value)
    return launch_forked_in_background


Overrides = Callable[..., tuple[str, ...]]


@pytest.fixture
def small_run(tmp_path: Path) -> Overrides:
    """Return the overrides of a run that is over in seconds on two pods, each with one rank."""

    def overrides(*words: str) -> tuple[str, ...]:
        return (
            *on_pods(tmp_path),
            *("tracker=local", "data=synthetic", "job.steps=4", "job.micro_batch=1", "job.global_batch=2"),
            *("job.sequence_length=16", "job.eval_every=0", "job.sample_tokens=0", *words),
        )

    return overrides


@pytest.fixture
def echo_run(tmp_path: Path) -> Overrides:
    """Return the overrides of a run on two such pods whose ranks import no torch and answer the shipped prompts."""
    return lambda *words: (*on_pods(tmp_path), *ECHO, *words)


@pytest.fixture
def torchless_run(tmp_path: Path) -> Overrides:
    """Return the overrides of a run on two such pods that no test sees end, with ranks that import no torch."""
    return lambda *words: (*on_pods(tmp_path), *endless(tmp_path), *words)


def on_pods(folder: Path) -> tuple[str, ...]:
    """Return the overrides of the backend."""
    return (
        *("backend=kubernetes", "backend.image=launcher:test", "backend.nodes=2", "backend.cpus=1"),
        *("backend.claim=runs", f"backend.mount={folder}/mnt", f"backend.python={sys.executable}"),
        *(f"backend.port={free_port(together=2)}", "backend.wait=true", "backend.gather_timeout_s=60"),
    )


def has_namespaces() -> bool:
    try:
        tried = subprocess.run(
            ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False
        )
    except FileNotFoundError:
        return False
    return tried.returncode == 0
