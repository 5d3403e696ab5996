"""No verb: compose, plan, then print the plan or run it."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.backends.registry import executor_of
from launcher.cli.arguments import parse_command_line
from launcher.config.compose import compose
from launcher.errors import ConfigError
from launcher.execution.lifecycle import start_run
from launcher.execution.prepare import prepare


def run(arguments: Sequence[str]) -> int:
    """Run what the overrides describe."""
    line = parse_command_line(arguments)
    if line.dry_run:
        from launcher.cli.plan import run as plan

        return plan([word for word in arguments if not word.lstrip("+").startswith("dry_run=")])
    if line.json:
        raise ConfigError("--json", why="belongs to a plan", fix="use launch plan … --json")
    composed = compose(line.words, config_dir=line.config_dir, sweeping=line.multirun)
    if line.multirun or composed.sweep is not None:
        from launcher.cli.sweep import run as sweep

        return sweep(arguments)
    prepared = prepare(composed)
    return start_run(prepared, executor_of(prepared.run.backend))
