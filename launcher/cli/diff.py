"""``launch diff``: what two configurations do not have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence

from launcher.cli.arguments import CommandLine, parse_command_line
from launcher.config.option_text import flatten_options
from launcher.errors import ConfigError, ConfigErrors
from launcher.errors.secrets import redact
from launcher.runs.config_source import resolved_config, split_source
from launcher.utils.text import format_table, json_text

HELP = """\
launch diff A B [--json] [--root DIR]: print the options in which two configurations differ.

  launch diff zero1_gpt2 zero2_gpt2_large                    two experiments
  launch diff default "default model=gpt2 job.steps=20"      with overrides: quote them
  launch diff runs/a/20260101-… runs/a/20260102-…            two runs
  launch diff 20260101 20260102                              the same, by how their ids begin
  launch diff zero3_gpt2xl runs/zero3_gpt2xl/20260101-…      an experiment and a run

The exit code is 0 whether or not they differ.
"""
_ABSENT = "-"


def run(arguments: Sequence[str]) -> int:
    """Print the differing options of two configurations."""
    line = parse_command_line(arguments, takes_runs=True)
    if line.help:
        print(HELP)
        return 0
    if len(line.words) != 2:
        fix = 'launch diff A B; overrides go inside quotes: launch diff A "B job.steps=20"'
        raise ConfigError("diff", " ".join(line.words), why=f"takes two names, not {len(line.words)}", fix=fix)
    one, other = _both(line)
    groups = list(dict.fromkeys(key.partition(".")[0] for key in (*one, *other)))
    keys = [key for key in dict.fromkeys((*one, *other)) if one.get(key, _ABSENT) != other.get(key, _ABSENT)]
    keys.sort(key=lambda key: groups.index(key.partition(".")[0]))
    if line.json:
        print(json_text({key: [one.get(key), other.get(key)] for key in keys}))
    elif keys:
        rows = [(key, one.get(key, _ABSENT), other.get(key, _ABSENT)) for key in keys]
        print("\n".join(format_table([("option", *line.words), *rows])))
    else:
        print("no difference")
    return 0


def _both(line: CommandLine) -> list[dict[str, str]]:
    """Return the options of each side, or refuse both at once."""
    sides: list[dict[str, str]] = []
    mistakes: list[ConfigError] = []
    for word in line.words:
        try:
            tree = resolved_config(split_source(word), config_dir=line.config_dir, root=line.root)
            sides.append(dict(flatten_options(redact(tree, os.environ))))
        except ConfigErrors as several:
            mistakes += several.errors
        except ConfigError as error:
            mistakes.append(error)
    if mistakes:
        raise ConfigErrors(mistakes)
    return sides
