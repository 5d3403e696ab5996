"""``launch show``: the whole configuration of an experiment or a run."""

from __future__ import annotations

import os
from collections.abc import Sequence

import yaml

from launcher.cli.arguments import parse_command_line
from launcher.errors.secrets import redact
from launcher.runs.config_source import resolved_config
from launcher.utils.text import json_text, printable

HELP = """\
launch show EXP|RUN [OVERRIDES] [--json] [--root DIR]: print the whole configuration, every value resolved.

  launch show zero3_gpt2xl                an experiment
  launch show default model=gpt2          the default run with another model
  launch show runs/gpt2_tiny/20260101-…   what a run was started with
  launch show 20260101                    the run whose id begins so, in ./runs
"""


def run(arguments: Sequence[str]) -> int:
    """Print a resolved configuration as YAML or JSON."""
    line = parse_command_line(arguments, takes_runs=True)
    if line.help or not line.words:
        print(HELP)
        return 0 if line.help else 2
    tree = redact(resolved_config(line.words, config_dir=line.config_dir, root=line.root), os.environ)
    if line.json:
        print(json_text(tree))
    else:
        print(printable(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)), end="")
    return 0
