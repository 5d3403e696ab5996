"""``launch show``: the whole configuration of an experiment or a run."""

from __future__ import annotations

import os

import yaml

from launcher.cli.arguments import Arguments
from launcher.errors.secrets import redact
from launcher.runs.config_source import resolved_config
from launcher.utils.text import json_text, printable


def run(arguments: Arguments) -> int:
    """Print a resolved configuration as YAML or JSON."""
    words = (arguments.source, *arguments.overrides)
    tree = redact(resolved_config(words, config_dir=arguments.config_dir, root=arguments.root), os.environ)
    if arguments.json:
        print(json_text(tree))
    else:
        print(printable(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)), end="")
    return 0
