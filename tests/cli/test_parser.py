"""The parser of verbs: overrides pass through as they are, help comes first, every mistake is one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.cli.parser import parse, run_command
from launcher.cli.verbs import VERBS
from launcher.errors import ConfigError

OVERRIDES = ("job.seed=-1", "~optimizer", "+exp=zero1_gpt2", "++a.b=--c", "x=~y", "k=+1", "q='a b'")


@pytest.mark.parametrize("name", ["", "plan", "doctor", "sweep"])
def test_overrides_pass_through(name: str) -> None:
    assert tuple(parse(name, OVERRIDES).overrides) == OVERRIDES


def test_options_may_stand_anywhere(tmp_path: Path) -> None:
    words = ("resume", "a", "job.steps=3", "--root", str(tmp_path), "dry_run=true", "--json", "optimizer.lr=-1")
    parsed = parse(words[0], words[1:])
    assert (parsed.run, tuple(parsed.overrides)) == ("a", ("job.steps=3", "optimizer.lr=-1"))
    assert (parsed.root, parsed.dry_run, parsed.json) == (tmp_path, True, True)


@pytest.mark.parametrize("name", ["", *VERBS])
def test_help_wins_over_everything_else(capsys: pytest.CaptureFixture[str], name: str) -> None:
    words = [*filter(None, [name]), "--no-such-flag", "job.steps=1", "--help"]
    assert run_command(words) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: launch {name}".rstrip())
    assert run_command(["help", *filter(None, [name])]) == 0
    assert capsys.readouterr().out == said
    assert max(map(len, said.splitlines())) <= 120


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "--jsn"], "--jsn: no such flag; did you mean --json?"),
        (["plan", "--steps=5"], "--steps=5: no such flag; options have no dashes: write job.steps=5"),
        (["plan", "-"], "-: no such flag; "),
        (["list", "--json"], "--json: no such flag; choose from: --config-dir, --help"),
        (["logs", "--rank"], "--rank: needs a value; write --rank K"),
        (["logs", "--follow=yes"], "--follow: takes no value; write --follow"),
        (["logs", "a", "b"], "launch logs: unexpected argument b; write launch logs [RUN] [-f] "),
        (["resume"], "launch resume: lacks RUN; write launch resume RUN [OVERRIDE…] "),
        (["diff", "a"], "launch diff: lacks B; write launch diff A B "),
        (["plan", "dry_run=false"], "dry_run=false: launch plan starts nothing; leave it out; launch without plan"),
        (["show", "default", "dry_run=False"], "dry_run=false: launch show starts nothing"),
        (["doctor", "+dry_run=false"], "dry_run=false: launch doctor starts nothing"),
        (["dry_run=true", "dry_run=false"], "dry_run: is given as true and as false; leave one of the two out"),
        (["plan", "dry_run=perhaps"], "dry_run=perhaps: is neither true nor false; set dry_run=true"),
        (["completion", "fis"], "completion=fis: is not one of the choices; did you mean fish?"),
        (
            ["-sc", "install=bash"],
            "-sc: is an option of Hydra, which does not support verbs; see launch completion --help",
        ),
        (["--config-dir", "nowhere"], "--config-dir=nowhere: is not a folder; name a folder that holds "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {said}")
    assert printed.err.count("\n") == 1
    with pytest.raises(ConfigError):
        run_command(words)
