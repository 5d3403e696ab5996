"""``launch plan``: what a run would do, as text or JSON."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.backends.registry import executor_of
from launcher.cli.arguments import parse_command_line
from launcher.config.compose import compose
from launcher.execution.prepare import prepare
from launcher.planning.render import render_plan
from launcher.utils.schema import to_tree
from launcher.utils.text import json_text

HELP = """\
launch plan [OVERRIDES] [--json] [--root DIR]: print what a run would do, and start nothing.

  launch plan                                   the default run
  launch plan +exp=zero3_gpt2xl                 an experiment; the same as launch +exp=zero3_gpt2xl dry_run=true
  launch plan +exp=zero3_gpt2xl backend.ranks=1 with an option changed
  launch plan +exp=zero3_gpt2xl --json          everything, as plan.json holds it
  launch plan 20260101                          what the run whose id begins so would do if it were started anew

Every check is made that a run makes before it starts. Nothing is written.
"""


def run(arguments: Sequence[str]) -> int:
    """Print a plan, or the runs of a sweep."""
    line = parse_command_line(arguments, takes_runs=True)
    if line.help:
        print(HELP)
        return 0
    if line.words and "=" not in line.words[0]:
        from launcher.cli.rerun import run as rerun
        from launcher.cli.saved_run import find_run_or_option

        find_run_or_option(line.words[0], line)
        return rerun([*arguments, "dry_run=true"])
    composed = compose(line.words, config_dir=line.config_dir, sweeping=line.multirun)
    if line.multirun or composed.sweep is not None:
        from launcher.cli.sweep import run as sweep

        return sweep([*arguments, "dry_run=true"])
    prepared = prepare(composed)
    plan = prepared.plan
    if line.json:
        print(json_text(to_tree(plan)))
    else:
        submission = executor_of(prepared.run.backend).render(plan, snapshot=prepared.snapshot)
        print(render_plan(plan, submission=submission), end="")
    return 0
