"""The parent process stays light: whatever is not rank-side imports, and plans, without the heavy packages."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import launcher

HEAVY = ("accelerate", "datasets", "deepspeed", "matplotlib", "numpy", "tokenizers", "torch", "transformers", "wandb")

RANK_SIDE = (
    "launcher.data.open",
    "launcher.engines",
    "launcher.models.build",
    "launcher.training",
)
"""Modules that only ranks, and the sidecars beside them, import; everything else belongs to the parent too."""

REFUSE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise AssertionError(name + " imported on the parent's side")

sys.meta_path.insert(0, Refuse())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter that fails, with the chain of imports, where a heavy package is wanted."""
    return subprocess.run([sys.executable, "-c", REFUSE + code], capture_output=True, text=True, timeout=120)


def parent_side_modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(launcher.__path__, "launcher.")]
    return [name for name in names if not any(f"{name}.".startswith(f"{side}.") for side in RANK_SIDE)]


def test_every_rank_side_name_exists() -> None:
    names = {module.name for module in pkgutil.walk_packages(launcher.__path__, "launcher.")}
    assert set(RANK_SIDE) <= names


def test_parent_side_modules_import_nothing_heavy() -> None:
    ended = python(f"import importlib\nfor name in {parent_side_modules()!r}: importlib.import_module(name)")
    assert ended.returncode == 0, ended.stderr


def test_planning_the_main_experiment_imports_nothing_heavy() -> None:
    ended = python("from launcher.__main__ import main\nsys.exit(main(['+exp=zero3_gpt2xl', 'dry_run=true']))")
    assert ended.returncode == 0, ended.stderr
    assert "1,557,611,200" in ended.stdout


def test_the_refusal_refuses() -> None:
    ended = python("import torch")
    assert ended.returncode == 1
    assert "torch imported on the parent's side" in ended.stderr
