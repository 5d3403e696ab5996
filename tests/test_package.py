"""The wheel holds all that the program needs, and works from any directory without the repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import launcher
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and from it the wheel, without a network and without leaving anything in the sources."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(REPOSITORY)]
    ended = subprocess.run(build, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into a folder of its own; its dependencies are those of this environment."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, timeout=120)
    return target


def run_installed(installed: Path, cwd: Path, *command: str) -> str:
    """Run a command that can only find the installed copy, and return what it printed."""
    env = {"PATH": f"{installed / 'bin'}:/usr/bin:/bin", "PYTHONPATH": str(installed), "HOME": str(cwd)}
    ended = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_wheel_holds_every_option_and_the_type_marker(wheel: Path) -> None:
    shipped = {f"launcher/conf/{path.relative_to(REPOSITORY / 'conf')}" for path in REPOSITORY.glob("conf/**/*.yaml")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert shipped <= names
    assert "launcher/py.typed" in names
    assert "launcher/runs/report/templates/page.html" in names
    assert not any(name.startswith(("tests/", "scripts/", "conf/")) for name in names)


def test_the_program_comes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    printed = run_installed(installed, tmp_path, sys.executable, "-c", "import launcher; print(launcher.__file__)")
    assert Path(printed.strip()).is_relative_to(installed)


def test_the_console_script_lists_options_from_another_directory(installed: Path, tmp_path: Path) -> None:
    printed = run_installed(installed, tmp_path, "launch", "list")
    assert "zero3_gpt2xl" in printed
    assert run_installed(installed, tmp_path, "launch", "--version") == f"launch {launcher.__version__}\n"


def test_the_module_plans_from_another_directory(installed: Path, tmp_path: Path) -> None:
    printed = run_installed(installed, tmp_path, sys.executable, "-m", "launcher", "+exp=zero3_gpt2xl", "dry_run=true")
    assert "1,557,611,200" in printed
    assert not list(tmp_path.glob("runs*"))
