"""The registries of executors: every kind of job, benchmark and backend has one, which exists."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

import launcher.backends.registry
import launcher.benchmarks.registry
import launcher.jobs.registry
from launcher.config.registry import KINDS
from launcher.deploy.registry import RENDERERS

EXECUTORS = {
    "job": launcher.jobs.registry.EXECUTORS,
    "benchmark": launcher.benchmarks.registry.EXECUTORS,
    "backend": launcher.backends.registry.EXECUTORS,
}


@pytest.mark.parametrize("group", EXECUTORS)
def test_every_kind_has_an_executor(group: str) -> None:
    assert EXECUTORS[group].keys() == KINDS[group].keys() - {"none"}


@pytest.mark.parametrize("target", [target for targets in EXECUTORS.values() for target in targets.values()])
def test_the_executor_exists(target: str) -> None:
    module, _, name = target.partition(":")
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    defined = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body  # not imported: it may import torch
    assert name in {node.name for node in defined if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_every_kind_of_deployment_has_a_renderer() -> None:
    assert RENDERERS.keys() == KINDS["deploy"].keys() - {"none"}
    for module in RENDERERS.values():
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        defined = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
        assert "render" in {node.name for node in defined if isinstance(node, ast.FunctionDef)}
