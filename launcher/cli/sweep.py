"""``launch sweep``: a grid of runs, from ``+sweep=NAME`` or from values given as a,b,c."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.backends.registry import executor_of
from launcher.cli.arguments import parse_command_line
from launcher.errors import ConfigError
from launcher.execution.sweep import plan_sweep, run_sweep

HELP = """\
launch sweep OVERRIDES: run every combination, one after the other.

  launch sweep +sweep=lr_batch                    a grid that ships; the same as launch +sweep=lr_batch
  launch sweep optimizer.lr=1e-4,3e-4 job.seed=1,2   your own; the same as launch -m …
  launch sweep … dry_run=true                     list the runs and start none

All runs are checked before the first one starts. A failing run does not stop the others; the exit code is the first
failing one's. The table is printed at the end and kept in sweep.json beside the runs.
"""


def run(arguments: Sequence[str]) -> int:
    """Run a sweep."""
    line = parse_command_line(arguments)
    if line.help:
        print(HELP)
        return 0
    sweep, trials = plan_sweep(line.words, config_dir=line.config_dir)
    if len(trials) < 2 and not sweep.parameters:
        fix = "give an option several values (optimizer.lr=1e-4,3e-4) or a grid (+sweep=lr_batch)"
        raise ConfigError("sweep", why="there is only one combination", fix=fix)
    if line.dry_run:
        for trial in trials:
            print(f"{trial.prepared.plan.run_dir}  {' '.join(trial.words)}")
        return 0
    return run_sweep(sweep, trials, executor_of)
