"""The command without a verb: compose and plan a run, then start it."""

from __future__ import annotations

from launcher.backends.registry import executor_of
from launcher.cli.arguments import Arguments
from launcher.config.compose import compose
from launcher.errors import ConfigError
from launcher.execution.prepare import prepare


def run(arguments: Arguments) -> int:
    """Run what the overrides describe."""
    if arguments.dry_run:
        from launcher.cli.plan import run as plan

        return plan(arguments)
    if arguments.json:
        raise ConfigError("--json", why="applies to plans only", fix="use launch plan … --json")
    composed = compose(arguments.overrides, config_dir=arguments.config_dir, sweeping=arguments.multirun)
    if arguments.multirun or composed.sweep is not None:
        from launcher.cli.sweep import run as sweep

        return sweep(arguments)
    prepared = prepare(composed)
    from launcher.execution.lifecycle import start_run  # supervision is no part of a plan

    return start_run(prepared, executor_of(prepared.run))
