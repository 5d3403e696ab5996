"""Plugins of tests: forgotten after each, modules made in a temporary folder."""

from __future__ import annotations

import copy
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.config.registry import KINDS
from launcher.plugins import loading
from launcher.plugins.loading import isolated_plugins
from tests.conftest import REPOSITORY
from tests.forked_runs import launch as launch

EXAMPLE = REPOSITORY / "examples" / "plugin"
"""The example's folder."""

WritePlugin = Callable[..., str]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Forget what a test loaded; the current folder is a temporary one."""
    monkeypatch.chdir(tmp_path)
    kinds, path, modules = copy.deepcopy(KINDS), list(sys.path), set(sys.modules)
    with isolated_plugins():
        yield
    for group, known in kinds.items():
        KINDS[group].clear()
        KINDS[group].update(known)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("launcher_example", "mine", "other"):
            del sys.modules[name]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the word that loads the example."""
    monkeypatch.syspath_prepend(EXAMPLE)
    return "plugins=[launcher_example]"


OPTIONS = '''
from dataclasses import dataclass
from typing import ClassVar
from launcher.config.schedule import Schedule

@dataclass(frozen=True, kw_only=True)
class Steps(Schedule):
    """Falls in steps."""

    kind: ClassVar[str] = "steps"

    height: float = 0.5
    """Of one step."""

    def decay(self, progress):
        return self.height
'''
STEPS_YAML = "# Falls in steps.\nkind: steps\n"
PLUGIN = 'Plugin(name="mine", options={"schedule": {"steps": "mine.options:Steps"}})'


@pytest.fixture
def write_plugin(tmp_path: Path) -> WritePlugin:
    """Write the package ``mine`` into the current folder, and return the word that loads it."""

    def write(plugin: str = PLUGIN, *, options: str = OPTIONS, name: str = "mine", **files: str) -> str:
        package = tmp_path / name
        package.mkdir(exist_ok=True)
        head = f"\nfrom launcher.plugins import Plugin\nplugin = {plugin}\n"
        (package / "__init__.py").write_text(textwrap.dedent(head))
        (package / "options.py").write_text(options)
        for file, text in files.items():
            path = package / "conf" / f"{file.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return f"plugins=[{name}]"

    return write


def install(name: str, tmp_path: Path, *, entry: str = "") -> None:
    """Move a package of the current folder to one of installed packages, with an entry point."""
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    (tmp_path / name).rename(site / name)
    metadata = site / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[launcher.plugins]\n{name} = {entry or name}\n")
    sys.path.insert(0, str(site))  # a fixture restores it


def forget() -> None:
    """Be as a process that has loaded nothing."""
    loading._loaded.clear()
    KINDS["schedule"].pop("steps", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]
