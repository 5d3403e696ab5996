"""``launch sweep``: a grid of runs, from ``+sweep=NAME`` or from values given as a,b,c."""

from __future__ import annotations

from launcher.backends.registry import executor_of
from launcher.cli.arguments import Arguments
from launcher.execution.sweep import plan_sweep, run_sweep


def run(arguments: Arguments) -> int:
    """Run a sweep."""
    sweep, trials = plan_sweep(arguments.overrides, config_dir=arguments.config_dir)
    if arguments.dry_run:
        for trial in trials:
            print(f"{trial.prepared.plan.run_dir}  {' '.join(trial.words)}")
        return 0
    return run_sweep(sweep, trials, executor_of)
