"""The comparison as a table, for the console and for verify.md, and as verify.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.table import table

if TYPE_CHECKING:
    from launcher.jobs.verify import Verify
    from launcher.verification.row import Row

_HEAD = ("strategy", "loss", "gradient norm", "weights", "tokens", "seconds", "")


def lines(rows: Sequence[Row], job: Verify) -> Iterator[str]:
    """Yield the table as aligned text."""
    yield from table([_HEAD, *(_cells(row, job) for row in rows)])


def markdown(rows: Sequence[Row], job: Verify, *, left_out: Mapping[str, str]) -> str:
    """Return the table in Markdown, with what was compared and what was not."""
    said = [
        f"# Strategies against one process, {job.steps} steps",
        "",
        f"Relative differences, the largest of all steps; allowed: loss {job.loss_tolerance:g}, gradient norm "
        f"{job.grad_norm_tolerance:g}, and the same {job.generated_tokens} tokens generated greedily.",
        "",
    ]
    if job.perturb:
        said += [f"The learning rate of every strategy but one process is off by {job.perturb:+.1%}, on purpose.", ""]
    said += [_markdown_row(_HEAD), _markdown_row(["---"] * len(_HEAD))]
    said += [_markdown_row(_cells(row, job)) for row in rows]
    if left_out:
        said += ["", "Left out:", "", *(f"- {name}: {why}" for name, why in left_out.items())]
    return "\n".join(said) + "\n"


def as_json(rows: Sequence[Row], job: Verify, *, left_out: Mapping[str, str]) -> dict[str, Any]:
    """Return everything as plain data; a difference that is not finite is ``null``."""
    return {
        "steps": job.steps,
        "perturb": job.perturb,
        "loss_tolerance": job.loss_tolerance,
        "grad_norm_tolerance": job.grad_norm_tolerance,
        "strategies": {
            row.name: {"passed": row.excess(job) <= 1, **{k: _plain(v) for k, v in dataclasses.asdict(row).items()}}
            for row in rows
        },
        "left_out": dict(left_out),
    }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(row: Row, job: Verify) -> list[str]:
    why = row.why(job)
    if row.loss_diff == row.grad_norm_diff == math.inf and row.trouble:
        numbers = ["-"] * 4
    else:
        diffs = (row.loss_diff, row.grad_norm_diff, row.weights_diff)
        numbers = [*(f"{diff:.1e}" for diff in diffs), "equal" if row.tokens_equal else "differ"]
    return [row.name, *numbers, f"{row.seconds:.1f}", f"FAIL: {why}" if why else "ok"]


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
