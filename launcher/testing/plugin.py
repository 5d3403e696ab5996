"""What every plugin keeps, as tests that those of a package inherit.

    from launcher.testing.plugin import PluginContract

    class TestPlugin(PluginContract):
        module = "my_package"
        experiments = ("my_experiment",)

Runs under pytest; needs no torch.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import launcher
from launcher.config.plugins import load_plugins
from launcher.config.snapshot import load_run, save_run

_HEAVY = ("torch", "transformers", "deepspeed", "datasets", "wandb")


class PluginContract:
    """Checks of one plugin; a subclass names its module."""

    module: ClassVar[str]
    """The plugin's module, as ``plugins=[…]`` names it."""

    experiments: ClassVar[tuple[str, ...]] = ()
    """Experiments of its YAML, each of which is composed and planned."""

    def test_it_loads(self) -> None:
        """Its names resolve, its options are documented and typed, and no name is taken."""
        load_plugins([self.module])

    def test_loading_it_imports_nothing_heavy(self) -> None:
        """Plans stay fast: torch is imported on ranks only."""
        code = (
            f"import sys; from launcher.config.plugins import load_plugins; load_plugins([{self.module!r}]); "
            f"print([name for name in {_HEAVY!r} if name in sys.modules])"
        )
        environ = {"PYTHONPATH": ":".join(filter(None, sys.path))}
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environ)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == "[]\n", f"loading {self.module} imports {ended.stdout.strip()}"

    def test_its_experiments_are_planned(self) -> None:
        """Each composes, passes every check, and its saved configuration gives it back."""
        for experiment in self.experiments:
            run = launcher.compose([f"plugins=[{self.module}]", f"+exp={experiment}"])
            assert self.module in run.plugins, f"+exp={experiment} uses nothing of {self.module}"
            assert launcher.render(launcher.plan(run)).startswith("Plan ")
            with tempfile.TemporaryDirectory() as folder:
                save_run(run, Path(folder) / "run.yaml")
                assert load_run(Path(folder) / "run.yaml") == run
