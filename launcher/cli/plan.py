"""``launch plan``: what a run would do, as text or JSON."""

from __future__ import annotations

from launcher.backends.registry import executor_of
from launcher.cli.arguments import Arguments, is_override
from launcher.config.compose import compose
from launcher.execution.prepare import prepare
from launcher.planning.render import render_plan
from launcher.utils.schema import to_tree
from launcher.utils.text import json_text


def run(arguments: Arguments) -> int:
    """Print a plan, or the trials of a sweep."""
    arguments.dry_run = True
    first, *overrides = arguments.overrides or [""]
    if first and not is_override(first):
        from launcher.cli.rerun import run as rerun
        from launcher.cli.saved_run import find_run_or_option

        find_run_or_option(first, arguments)
        arguments.run, arguments.overrides = first, overrides
        return rerun(arguments)
    composed = compose(arguments.overrides, config_dir=arguments.config_dir, sweeping=arguments.multirun)
    if arguments.multirun or composed.sweep is not None:
        from launcher.cli.sweep import run as sweep

        return sweep(arguments)
    prepared = prepare(composed)
    plan = prepared.plan
    if arguments.json:
        print(json_text(to_tree(plan)))
    else:
        submission = executor_of(prepared.run).render(plan, snapshot=prepared.snapshot)
        print(render_plan(plan, submission=submission), end="")
    return 0
