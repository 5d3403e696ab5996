"""Lines that a run prints before its ranks start and after it has completed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config.option_text import quoted_word
from launcher.planning.render import placement_lines
from launcher.planning.topology import group_hosts
from launcher.protocol.plan import Plan
from launcher.protocol.results import STOPPED_EARLY
from launcher.protocol.rundir import RunDir
from launcher.runs.checkpoints import kept_checkpoints
from launcher.runs.state import continue_command, read_run_state
from launcher.utils.text import shell_command, short_path

_INTERNAL_FILES = frozenset(
    {
        "run.yaml",
        "plan.json",
        "session.json",
        "result.json",
        "timeline.jsonl",
        "environment.json",
        "channel",
        "hostfile",
    }
)


def opening_lines(plan: Plan) -> Iterator[str]:
    """Yield the lines printed at a start: work, run directory, tracker and warnings."""
    hosts = "" if len(plan.hosts) == 1 else f" on {len(plan.hosts)} hosts"
    ranks = f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}{hosts}"
    params = f"{plan.memory.num_params:,} parameters, " if plan.memory else ""
    yield f"{plan.name}: {params}{ranks}, {_amount(plan)}"
    if len(plan.hosts) > 1:
        yield from placement_lines(group_hosts(plan.hosts))
    yield f"run directory: {plan.run_dir}"
    for tracker in plan.tracker.members or (plan.tracker,):
        yield f"tracker: {tracker.kind}, {tracker.mode}: {tracker.reason}"
    yield from (f"warning: {warning}" for warning in plan.warnings)


def _amount(plan: Plan) -> str:
    """Return the amount of work; for a server, its address."""
    work, compared = plan.work, plan.details.get("compared on")
    if compared is not None:
        return f"{plan.job}, compared on {compared}"
    if work.batch is not None:
        return f"{work.batch} sequences a step" + (f", {work.num_steps} steps" if work.total_tokens else "")
    if work.num_steps == 0:
        return ", ".join([plan.job, *(f"{name} {value}" for name, value in plan.details.items() if name == "address")])
    return f"{work.num_steps} {'requests' if plan.summary.model else 'measurements'}"


def closing_text(result: Mapping[str, Any], directory: RunDir, *, elapsed_s: float) -> str:
    """Return the text printed after a completed run: outcome, files, and next commands.

    Args:
        result: its ``result.json``.
        directory: of the run.
        elapsed_s: time it took.
    """
    metrics = result["metrics"]
    loss = metrics.get("eval/loss")
    parts = [f"{result['status']} in {elapsed_s:.0f} s"]
    if (step := metrics.get(STOPPED_EARLY)) is not None:
        parts.append(f"stopped early after step {step:.0f}")
    if loss is not None:
        beaten = ", ".join(
            f"{name.removeprefix('baseline/')} {value:.4f}"
            for name, value in metrics.items()
            if name.startswith("baseline/") and value is not None
        )
        parts.append(f"held-out loss {loss:.4f}" + (f" ({beaten})" if beaten else ""))
    where, steps = short_path(directory.path), sorted(directory.checkpoints.glob("step_*/manifest.json"))
    commands = [shell_command(["launch", verb, where]) for verb in ("report", "status")]
    state = read_run_state(directory)
    output = state.plan.get("details", {}).get("output")
    is_elsewhere = output is not None and (Path(output).is_absolute() or not (directory.path / output).exists())
    more, model = continue_command(state), []
    if more and more.startswith("launch job=generate"):
        model = [_model_line(directory, where)]
    elif more:
        commands.append(more)
    return "\n".join(
        [
            "; ".join(parts),
            f"left in {where}: {', '.join(_left(directory, steps))}{f'; outside it: {output}' if is_elsewhere else ''}",
            "next: " + "\n      ".join(commands),
            *model,
        ]
    )


def _model_line(directory: RunDir, where: str) -> str:
    """Return how to use the model that a run has left, and which checkpoint is the best."""
    weights, kept = quoted_word("model.weights", where), kept_checkpoints(directory)
    line = f"model: {shell_command(['launch', 'chat', where])}, or launch job=generate|serve|evaluate {weights}"
    if kept is None or kept.best in (None, kept.newest):
        return line
    return f"{line} (@best: {kept.best_text})"


def _left(directory: RunDir, steps: Sequence[Path]) -> Iterator[str]:
    """Yield the files of a run that users read, without those that only this program reads."""
    for entry in sorted(directory.path.iterdir()):
        if entry == directory.checkpoints and steps:
            yield f"checkpoints/{steps[-1].parent.name}"
        elif not entry.name.startswith(".") and entry.name not in _INTERNAL_FILES and entry != directory.checkpoints:
            yield f"{entry.name}/" if entry.is_dir() else entry.name
