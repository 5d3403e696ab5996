"""``launch completion``: what is offered, and that each shell asks for it."""

from __future__ import annotations

import importlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.cli.completion import SCRIPTS, candidates
from launcher.cli.parser import parse, run_command
from launcher.cli.verbs import LAUNCH, VERBS
from launcher.errors import ConfigError
from tests.cli.conftest import Make


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("sta", ["status"]),
        ("job.ste", ["job.steps="]),
        ("optimizer.lr", ["optimizer.lr="]),
        ("optimi", ["optimizer="]),
        ("parallel=zero3", ["parallel=zero3", "parallel=zero3_offload"]),
        ("+exp=zero_inf", ["+exp=zero_infinity_gpt2xl"]),
        ("backend.agent=", ["backend.agent=deepspeed", "backend.agent=torchrun"]),
        ("dry_run=t", ["dry_run=true"]),
        ("--ver", ["--version"]),
        ("plan job.ste", ["job.steps="]),
        ("plan --js", ["--json"]),
        ("list precis", ["precision"]),
        ("list precision/bf", ["precision/bf16"]),
        ("benchmark c", ["compare"]),
        ("data p", ["preview"]),
        ("logs --ag", ["--agents"]),
        ("logs --li", ["--lines"]),
        ("resume --mu", []),
        ("logs --rank ", []),
        ("status 2026", ["20260101-120000-abcd"]),
        ("resume 2026", ["20260101-120000-abcd"]),
        ("rerun 2026 job.ste", ["job.steps="]),
        ("show zero_inf", ["zero_infinity_gpt2xl"]),
        ("completion z", ["zsh"]),
        ("--config-dir ", []),
        ("run.ro", ["run.root="]),
        ("nothing", []),
    ],
)
def test_what_may_stand_there(make_run: Make, typed: str, offered: list[str]) -> None:
    make_run()
    make_run("$(touch x)", name="bad")
    found = candidates(typed.split(" "))
    assert set(offered) <= set(found)
    assert all(word.startswith(typed.split(" ")[-1]) for word in found)
    assert offered or not found
    assert not any("$" in word for word in candidates(["status", ""]))


@pytest.mark.parametrize("flag", [["--config-dir", "DIR"], ["--config-dir=DIR"]])
def test_options_of_the_users_own_folder_are_offered(tmp_path: Path, flag: list[str]) -> None:
    for file in ("exp/my_own.yaml", "model/my_model.yaml", "mine/one.yaml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    words = [word.replace("DIR", str(tmp_path)) for word in flag]
    for typed, offered in (
        (["+exp=my"], "+exp=my_own"),
        (["model=my"], "model=my_model"),
        (["min"], "mine="),
        (["plan", "exp=my"], "exp=my_own"),
        (["show", "my_"], "my_own"),
        (["list", "model/my"], "model/my_model"),
    ):
        verb = typed[:-1]
        assert offered in candidates([*verb, *words, typed[-1]])
        assert offered not in candidates(typed)
    assert "model=gpt2" in candidates([*words, "model="])
    assert "model=gpt2" in candidates(["--config-dir", str(tmp_path / "nowhere"), "model="])


def test_runs_of_another_root_are_offered(make_run: Make, tmp_path: Path) -> None:
    make_run()
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert candidates(["status", "2026"]) == []
    assert candidates(["status", "--root", str(tmp_path / "elsewhere"), "2026"]) == ["20260101-120000-abcd"]


def test_every_verb_is_completed() -> None:
    assert set(VERBS) <= set(candidates([""]))
    for name in VERBS:
        assert callable(importlib.import_module(f"launcher.cli.{name}").run)


VALUES = {"K": "3", "LINES": "3", "SHARE": "5%"}
"""A value that an option accepts, by its metavar; the others take a path."""


@pytest.mark.parametrize("name", ["", *VERBS])
def test_every_option_is_explained_offered_and_parsed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run_command([*filter(None, [name]), "--help"]) == 0
    said = capsys.readouterr().out
    verb = VERBS[name] if name else LAUNCH
    actions = ("compare", "preview")
    words = [one.metavar if one.metavar in actions else "bash" for one in verb.positionals if one.nargs != "*"]
    offered = candidates([*filter(None, [name]), "-"])
    for option in verb.options:
        assert (option.names[-1] in offered) != option.is_hidden
        assert (f"  {', '.join(option.names)}" in said) != option.is_hidden
        value = [VALUES.get(option.metavar, str(tmp_path))] if option.metavar else []
        parsed = parse(name, [*words, option.names[0], *value])
        assert getattr(parsed, option.destination) not in (None, False), option.names


@pytest.mark.parametrize("shell", [name for name in SCRIPTS if shutil.which(name)])
def test_a_shell_asks(tmp_path: Path, shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The script of each shell that is installed here; bash is everywhere."""
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    program = tmp_path / "launch"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m launcher "$@"\n')
    program.chmod(0o755)
    assert "zero3_offload" in _completed(shell, script, "launch plan parallel=zero3_")[-1]


@pytest.mark.parametrize("shell", [name for name in SCRIPTS if shutil.which(name)])
def test_a_shell_completes_files_where_nothing_else_fits(tmp_path: Path, shell: str) -> None:
    """Bash and zsh do it themselves where they are offered nothing: not even one empty word."""
    script = tmp_path / "script"
    script.write_text(SCRIPTS[shell])
    program = tmp_path / "launch"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m launcher "$@"\n')
    program.chmod(0o755)
    (tmp_path / "epoch=3.txt").touch()
    expected = {"bash": ["0"], "zsh": ["-P *=", "files"], "fish": ["data.path=epoch=3.txt"]}
    assert _completed(shell, script, "launch plan data.path=epo") == expected[shell]


def _completed(shell: str, script: Path, line: str) -> list[str]:
    """Return what a shell would insert, or what its script asks the shell for."""
    ask = {
        "bash": f". {script}; COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; _launch 2> /dev/null; "
        'printf "%s\\n" "${COMPREPLY[@]:-${#COMPREPLY[@]}}"',
        "zsh": f"compdef() {{ :; }}; compadd() {{ print -l -- $@; }}; compset() {{ print -- $@; }}; "
        f"_files() {{ print files; }}; words=({line}); CURRENT=3; . {script}; _launch",
        "fish": f"source {script}; complete -C '{line}'",
    }
    answer = subprocess.run(
        [shell, "-c", ask[shell]],
        capture_output=True,
        text=True,
        check=True,
        cwd=script.parent,
        env={"PATH": f"{script.parent}:/usr/bin:/bin", "HOME": str(script.parent)},
        timeout=60,
    )
    return answer.stdout.splitlines()


def test_candidates_are_printed_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "--words", "plan", "parallel=zero3"]) == 0
    assert capsys.readouterr().out.splitlines() == ["parallel=zero3", "parallel=zero3_offload"]
    with pytest.raises(ConfigError, match="needs the name of a shell; choose from: bash, zsh, fish"):
        run_command(["completion"])


def test_a_shell_that_is_none() -> None:
    with pytest.raises(ConfigError, match="did you mean bash"):
        run_command(["completion", "bsh"])
