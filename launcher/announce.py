"""What the parent says before and after a run: a few lines, where the plan has pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.alike import groups_of
from launcher.plan import Plan
from launcher.render import places


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


def closing(result: Mapping[str, Any], *, elapsed_s: float) -> str:
    """Return how a completed run went, from its ``result.json``."""
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
    return "; ".join(told)
