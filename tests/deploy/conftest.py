"""Servers to deploy, composed and planned as ``launch deploy`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config.run import Run
from launcher.deploy.prepare import prepare
from launcher.deploy.registry import render
from launcher.protocol.plan import Plan

Rendered = tuple[Run, Plan, dict[str, str]]
Render = Callable[..., Rendered]
SERVER = ("job=serve", "tracker=local", "deploy.image=registry.example/team/launcher:1")


@pytest.fixture
def rendered(tmp_path: Path) -> Render:
    """Return the run, the plan and the files of a server with these overrides."""

    def make(*words: str, kind: str = "kubernetes") -> Rendered:
        run, plan = prepare((*SERVER, f"deploy={kind}", f"deploy.out={tmp_path}/out", *words))
        return run, plan, render(run, plan)

    return make


def manifests_of(files: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the manifests of a rendering by kind; the Service of all versions is ``Service``."""
    found: dict[str, dict[str, Any]] = {}
    for path, text in files.items():
        if path.startswith("manifests/"):
            manifest = yaml.safe_load(text)
            found.setdefault(manifest["kind"], manifest)
    return found
