"""What the parent says before and after a run: a few lines, where the plan has pages."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.alike import groups_of
from launcher.plan import Plan
from launcher.render import places
from launcher.rundir import RunDir
from launcher.wording import short_path

_PLUMBING = frozenset(
    {"run.yaml", "plan.json", "session.json", "result.json", "timeline.jsonl", "environment.json", "board", "hostfile"}
)


def opening(plan: Plan) -> Iterator[str]:
    """Yield what is about to happen, where it is kept, where W&B goes, and what may surprise."""
    hosts = "" if len(plan.hosts) == 1 else f" on {len(plan.hosts)} hosts"
    ranks = f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}{hosts}"
    params = f"{plan.memory.num_params:,} parameters, " if plan.memory else ""
    yield f"{plan.name}: {params}{ranks}, {_amount(plan)}"
    if len(plan.hosts) > 1:
        yield from places(groups_of(plan.hosts))
    yield f"run directory: {plan.run_dir}"
    yield f"tracker: {plan.tracker.kind}, {plan.tracker.mode}: {plan.tracker.reason}"
    yield from (f"warning: {warning}" for warning in plan.warnings)


def _amount(plan: Plan) -> str:
    """Return how much there is to do; for work without an end, what is done."""
    work = plan.work
    if work.batch is not None:
        return f"{work.batch} sequences a step, {work.steps} steps"
    if work.steps == 0:
        return ", ".join([plan.job, *(f"{name} {value}" for name, value in plan.outline.items() if name == "address")])
    return f"{work.steps} {'requests' if plan.what.model else 'measurements'}"


def closing(result: Mapping[str, Any], directory: RunDir, *, elapsed_s: float) -> str:
    """Return how a completed run went, what it left, and what to type next.

    Args:
        result: its ``result.json``.
        directory: of the run.
        elapsed_s: time it took.
    """
    metrics = result["metrics"]
    loss = metrics.get("eval/loss")
    told = [f"{result['status']} in {elapsed_s:.0f} s"]
    if loss is not None:
        beaten = ", ".join(
            f"{name.removeprefix('baseline/')} {value:.4f}"
            for name, value in metrics.items()
            if name.startswith("baseline/") and value is not None
        )
        told.append(f"held-out loss {loss:.4f}" + (f" ({beaten})" if beaten else ""))
    where, steps = short_path(directory.path), sorted(directory.checkpoints.glob("step_*/manifest.json"))
    verbs = ["report", "status", *(["resume"] if steps else [])]
    return "\n".join(
        [
            "; ".join(told),
            f"left in {where}: {', '.join(_left(directory, steps))}",
            "next: " + "\n      ".join(shlex.join(["launch", verb, where]) for verb in verbs),
        ]
    )


def _left(directory: RunDir, steps: Sequence[Path]) -> Iterator[str]:
    """Yield what a user may want of the files of a run; not those that only this program reads."""
    for entry in sorted(directory.path.iterdir()):
        if entry == directory.checkpoints and steps:
            yield f"checkpoints/{steps[-1].parent.name}"
        elif not entry.name.startswith(".") and entry.name not in _PLUMBING and entry != directory.checkpoints:
            yield f"{entry.name}/" if entry.is_dir() else entry.name
