"""``launch sweep``: a grid of runs, from ``+sweep=NAME`` or from values given as a,b,c."""

from __future__ import annotations

from launcher.backends.registry import executor_of
from launcher.cli.arguments import Arguments
from launcher.execution.sweep import plan_sweep, render_arrays, run_sweep
from launcher.utils.text import printable


def run(arguments: Arguments) -> int:
    """Run a sweep."""
    sweep, trials = plan_sweep(arguments.overrides, config_dir=arguments.config_dir)
    if arguments.dry_run:
        for trial in trials:
            print(f"{trial.prepared.plan.run_dir}  {' '.join(trial.words)}")
        if text := render_arrays(trials, executor_of):
            print(printable(f"\n{text}"), end="")
        return 0
    return run_sweep(sweep, trials, executor_of)
