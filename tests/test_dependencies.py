"""Every imported third-party module is a declared dependency; optional ones are imported by their owners only."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import pytest

from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
DISTRIBUTIONS = {
    "_distutils_hack": "setuptools",
    "celpy": "cel-python",
    "cyclonedx": "cyclonedx-python-lib",
    "hydra": "hydra-core",
    "mlflow": "mlflow-skinny",
    "PIL": "pillow",
    "yaml": "pyyaml",
}
"""Modules whose distribution has another name."""
OWNERS = {
    "serve": ("launcher/inference/server/",),
    "quantize": ("launcher/quantization/codecs.py", "launcher/engines/adamw_8bit.py"),
    "fp8": ("launcher/models/transforms.py",),
    "mlflow": ("launcher/trackers/mlflow_run.py",),
    "tensorboard": ("launcher/trackers/tensorboard_run.py",),
    "prometheus": ("launcher/trackers/prometheus_run.py",),
    "eval": ("launcher/benchmarks/lm_eval/", "launcher/training/lm_eval_harness.py"),
    "testing": ("launcher/testing/",),
    "gguf": ("launcher/verification/runtime.py",),
    "onnx": ("launcher/verification/runtime.py",),
    "openvino": ("launcher/verification/runtime.py", "launcher/models/edge_folders.py"),
}
"""Folders and files in which the packages of each extra may be imported."""
LAZY = {
    *("launcher/quantization/codecs.py", "launcher/models/transforms.py"),
    *("launcher/verification/runtime.py", "launcher/models/edge_folders.py"),
}
"""Of these files, those that may import them within functions only, because much else imports the files."""
OTHER_ENVIRONMENTS = {
    "scripts/bench/peer_litserve.py": "litserve",
    "scripts/bench/peer_server.py": "ctranslate2",
}
"""Scripts that run in an environment which scripts/bench/serving_peers_make.py makes, and their package."""
PYTHONPATH = PROJECT["tool"]["pytest"]["ini_options"]["pythonpath"]
OWN = ("launcher", "tests", "scripts", "examples")


@dataclass(frozen=True, kw_only=True)
class Imports:
    """Dotted names that a file imports: when it is loaded, and later within a function or for types only."""

    at_once: set[str] = field(default_factory=set)
    lazily: set[str] = field(default_factory=set)


def imports_of(source: str) -> Imports:
    """Return what a module imports; ``pytest.importorskip("name")`` is a lazy import."""
    found = Imports()
    _collect(ast.parse(source).body, found, is_lazy=False)
    return found


def _collect(nodes: list[ast.stmt] | Iterator[ast.AST], found: Imports, *, is_lazy: bool) -> None:
    for node in nodes:
        names = found.lazily if is_lazy else found.at_once
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
            names.update(str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant))
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_for_types = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        _collect(ast.iter_child_nodes(node), found, is_lazy=is_lazy or is_function or is_for_types)


def declared(*requirements: str) -> set[str]:
    """Return the normalized names of requirements such as ``hydra-core>=1.3,<2``."""
    return {normalized(re.split(r"[^\w.-]", word)[0]) for word in requirements}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distribution(module: str) -> str:
    """Return the distribution that brings a module."""
    top = module.partition(".")[0]
    return normalized(DISTRIBUTIONS.get(top, top))


CORE = declared(*PROJECT["project"]["dependencies"])
EXTRAS = {name: declared(*words) for name, words in PROJECT["project"]["optional-dependencies"].items()}
DEV = declared(*PROJECT["dependency-groups"]["dev"])


@cache
def files_below(*folders: str) -> dict[str, Imports]:
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return {str(path.relative_to(REPOSITORY)): imports_of(path.read_text(encoding="utf-8")) for path in paths}


def local_modules(file: str) -> set[str]:
    """Return the modules that a file imports by a bare name: those beside it, and those on pytest's ``pythonpath``."""
    folders = [(REPOSITORY / file).parent, *(REPOSITORY / path for path in PYTHONPATH)]
    return {path.stem for folder in folders for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}


def third_party(names: set[str], *, local: set[str] = frozenset()) -> set[str]:
    """Return distributions that are neither Python's nor ours."""
    tops = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - set(OWN) - local
    return {distribution(top) for top in tops}


def errors_of_launcher(files: dict[str, Imports]) -> Iterator[str]:
    """Yield imports of the program that are not declared, or are optional and not their owner's."""
    for file, found in files.items():
        lazily, at_once = third_party(found.lazily), third_party(found.at_once)
        for name in sorted((lazily | at_once) - CORE):
            extras = [extra for extra, names in EXTRAS.items() if name in names]
            if not extras:
                yield f"{file}: {name} is no dependency of the project"
            elif not any(_owns(file, extra, is_lazy=name not in at_once) for extra in extras):
                yield f"{file}: {name} belongs to the extra {' or '.join(extras)}: import it in its part, lazily"
    optional = set().union(*EXTRAS.values()) - CORE
    for file, chain in _files_that_load(optional, files).items():
        if len(chain) > 1 and not any(_owns(file, extra, is_lazy=False) for extra in EXTRAS):
            yield f"{' -> '.join(chain)}: loading the first one needs an extra"


def _owns(file: str, extra: str, *, is_lazy: bool) -> bool:
    return any(file.startswith(place) for place in OWNERS[extra]) and (is_lazy or file not in LAZY)


def _files_that_load(distributions: set[str], files: dict[str, Imports]) -> dict[str, list[str]]:
    """Return the files whose loading imports one of these, each with the chain of imports that leads there."""
    importers: dict[str, list[str]] = defaultdict(list)
    for file, found in files.items():
        for name in found.at_once:
            stem = name.replace(".", "/")
            for target in {f"{stem}.py", f"{stem}/__init__.py"} & files.keys():
                importers[target].append(file)
    chains = {file: [file] for file, found in files.items() if third_party(found.at_once) & distributions}
    waiting = list(chains)
    while waiting:
        target = waiting.pop()
        for file in importers[target]:
            if file not in chains:
                chains[file] = [file, *chains[target]]
                waiting.append(file)
    return chains


def errors_of_tools(files: dict[str, Imports]) -> Iterator[str]:
    """Yield imports of tests and scripts that neither the project nor the group ``dev`` declares."""
    for file, found in files.items():
        names = third_party(found.at_once | found.lazily, local=local_modules(file)) - CORE - DEV
        yield from (
            f"{file}: {name} is declared neither by the project nor in the group dev"
            for name in sorted(names - {OTHER_ENVIRONMENTS.get(file)})
        )


def test_the_program_imports_declared_packages() -> None:
    assert list(errors_of_launcher(files_below("launcher"))) == []


@pytest.mark.parametrize("folder", ["scripts", "tests"])
def test_scripts_and_tests_import_declared_packages(folder: str) -> None:
    assert list(errors_of_tools(files_below(folder))) == []


def test_the_group_dev_has_every_extra() -> None:
    assert set().union(*EXTRAS.values()) - CORE - DEV == set()


def test_what_the_checks_find() -> None:
    planted = {
        "launcher/a.py": "import unheard_of.part",
        "launcher/b.py": "def f() -> None:\n    from requests import get",
        "launcher/c.py": "if TYPE_CHECKING:\n    from fastapi import FastAPI",
        "launcher/d.py": "from launcher.inference.server import app",
        "launcher/e.py": "def f() -> None:\n    import launcher.inference.server.app",
        "launcher/inference/server/app.py": "import fastapi, torch, os",
        "launcher/quantization/codecs.py": "import bitsandbytes\ndef f() -> None:\n    import torchao.quantization",
    }
    assert list(errors_of_launcher({file: imports_of(source) for file, source in planted.items()})) == [
        "launcher/a.py: unheard-of is no dependency of the project",
        "launcher/b.py: requests is no dependency of the project",
        "launcher/c.py: fastapi belongs to the extra serve: import it in its part, lazily",
        "launcher/quantization/codecs.py: bitsandbytes belongs to the extra quantize: import it in its part, lazily",
        "launcher/d.py -> launcher/inference/server/app.py: loading the first one needs an extra",
    ]
    tool = {"tests/x.py": imports_of("import harness, pytest\nx = pytest.importorskip('boto3.session')")}
    assert list(errors_of_tools(tool)) == ["tests/x.py: boto3 is declared neither by the project nor in the group dev"]
