"""``launch runs``: every run below a folder, with its state."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from launcher.cli.arguments import Arguments
from launcher.config.paths import is_named_path
from launcher.protocol.rundir import RunDir
from launcher.runs.index import find_run, is_below, list_runs
from launcher.runs.state import RunState, read_run_state
from launcher.utils.text import duration_text, format_table, json_text, one_line


def run(arguments: Arguments) -> int:
    """Print a table of runs."""
    states = [read_run_state(run_dir) for run_dir in _wanted(arguments)]
    if arguments.json:
        print(json_text([_tree(state) for state in states]))
        return 0
    if not states:
        print(f"no runs in {arguments.root}: start one with launch, or name another folder with --root DIR")
        return 0
    head, now = ("id", "name", "status", "step", "loss", "ranks", "backend", "age", "took"), time.time()
    print("\n".join(format_table([head, *(_row(state, arguments.root, now) for state in states)])))
    for state in states:
        for why in state.unreadable_files:
            print(one_line(f"{state.run_dir.path}: {why}, and is skipped"), file=sys.stderr)
    return 0


def _wanted(arguments: Arguments) -> list[RunDir]:
    """Return the runs to list: all, or those named; a word may also name a folder of runs."""
    found: list[RunDir] = []
    for word in arguments.runs:
        inside = list_runs(Path(word)) if is_named_path("run", word) and Path(word).is_dir() else []
        found += inside or [find_run(word, arguments.root)]
    return list(dict.fromkeys(found)) if arguments.runs else list_runs(arguments.root)


def _row(state: RunState, root: Path, now: float) -> tuple[str, ...]:
    loss = state.metrics.get("train/loss")
    until = now if state.ended_at is None else state.ended_at
    return (
        _id_below(state.run_dir, root),
        state.name,
        state.status,
        state.steps_text,
        "-" if loss is None else f"{loss:.4f}",
        _ranks(state),
        state.backend or "-",
        duration_text(now - state.started_at),
        "-" if state.status == "lost" else duration_text(until - state.started_at),
    )


def _id_below(run_dir: RunDir, root: Path) -> str:
    """Return the run's id with its sweep; the directory of a run outside of the root."""
    if is_below(run_dir, root):
        return run_dir.path.relative_to(root.absolute()).as_posix().partition("/")[2]
    here = Path.cwd()
    return str(run_dir.path.relative_to(here) if run_dir.path.is_relative_to(here) else run_dir.path)


def _ranks(state: RunState) -> str:
    """Return ``2×8``, or each host's number if they differ."""
    slots = state.slots
    if not slots:
        return "-"
    return f"{len(slots)}×{slots[0]}" if len(set(slots)) == 1 else "+".join(map(str, slots))


def _tree(state: RunState) -> dict[str, Any]:
    return {
        "run_id": state.run_id,
        "name": state.name,
        "run_dir": str(state.run_dir.path),
        "status": state.status,
        "exit_code": state.exit_code,
        "step": state.step,
        "num_steps": state.num_steps,
        "loss": state.metrics.get("train/loss"),
        "slots": state.slots,
        "backend": state.backend,
        "started_at": state.started_at,
        "ended_at": state.ended_at,
    }
