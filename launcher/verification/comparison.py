"""Differences of strategies from one process, as table, verify.md and verify.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.utils.text import format_table
from launcher.verification.forked_ranks import ERROR_KEY, TIME_KEY, CaseAnswer

if TYPE_CHECKING:
    from launcher.config.job.verify import Verify


@dataclass(frozen=True, kw_only=True)
class StrategyResult:
    """Result of one strategy: largest relative differences of all steps.

    They are infinite where a number is missing.
    """

    name: str
    seconds: float
    loss_diff: float = math.inf
    grad_norm_diff: float = math.inf
    weights_diff: float = math.inf
    """L2 norm of the difference of the final weights, against that of the reference's."""
    worst_weight: str = ""
    """The tensor that is farthest apart, by the same measure."""
    tokens_equal: bool = False
    error: str = ""
    """Why there is nothing to compare, or what does not fit besides the numbers."""

    def excess(self, job: Verify) -> float:
        """Return how many times the allowed difference it is away; 1 and less passes."""
        if self.error or not self.tokens_equal:
            return math.inf
        pairs = ((self.loss_diff, job.loss_tolerance), (self.grad_norm_diff, job.grad_norm_tolerance))
        return max((0.0 if diff == 0 else math.inf) if not allowed else diff / allowed for diff, allowed in pairs)

    def why(self, job: Verify) -> str:
        """Return the reason why it failed; empty if it passed."""
        if self.error:
            return self.error
        reasons = []
        if not self.loss_diff <= job.loss_tolerance:
            reasons.append(f"loss differs by {self.loss_diff:.1e} (allowed {job.loss_tolerance:g})")
        if not self.grad_norm_diff <= job.grad_norm_tolerance:
            reasons.append(f"gradient norm differs by {self.grad_norm_diff:.1e} (allowed {job.grad_norm_tolerance:g})")
        if not self.tokens_equal:
            reasons.append("other tokens are generated")
        return ", ".join(reasons)


def compare(name: str, answers: Mapping[int, CaseAnswer], reference: CaseAnswer, *, seconds: float) -> StrategyResult:
    """Compare what the ranks of a case answered with what one process did."""
    if error := error_of(answers):
        return StrategyResult(name=name, seconds=seconds, error=error)
    ours = answers[0]
    weights, worst, error = _weights_difference([answer["weights"] for answer in answers.values()])
    return StrategyResult(
        name=name,
        seconds=seconds,
        loss_diff=largest_difference(ours["losses"], reference["losses"]),
        grad_norm_diff=largest_difference(ours["grad_norms"], reference["grad_norms"]),
        weights_diff=weights,
        worst_weight=worst,
        tokens_equal=all(answer["generated"] == reference["generated"] for answer in answers.values()),
        error=error,
    )


def error_of(answers: Mapping[int, CaseAnswer]) -> str:
    """Return the error of the first rank that failed; empty if none did."""
    failed = [(answer[TIME_KEY], rank) for rank, answer in answers.items() if ERROR_KEY in answer]
    if not failed:
        return ""
    rank = min(failed)[1]  # others fail because of it
    return f"rank {rank}: {answers[rank][ERROR_KEY]}"


def largest_difference(values: Sequence[float | None], expected: Sequence[float | None]) -> float:
    """Return the largest relative difference of numbers in pairs; infinite where one is missing."""
    return max(_relative_difference(one, other) for one, other in zip(values, expected, strict=True))


def _relative_difference(one: float | None, other: float | None) -> float:
    if one is None or other is None or not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return 0.0 if one == other else abs(one - other) / max(abs(other), 1e-30)


def _weights_difference(parts: Sequence[Mapping[str, Any]]) -> tuple[float, str, str]:
    """Return the weights' relative difference, the worst tensor, and what does not match."""
    apart: dict[str, tuple[float, float]] = {}
    for part in parts:
        apart |= {name: (square, of) for name, (square, of) in part["apart"].items()}
    missing = set(parts[0]["all"]) - apart.keys()
    unknown = [name for part in parts for name in part["unknown"]]
    if missing or unknown:
        words = [("missing on all ranks:", sorted(missing)), ("not in the reference:", unknown)]
        return math.inf, "", "; ".join(f"{text} {', '.join(names[:3])}" for text, names in words if names)
    total, norm = (math.fsum(column) for column in zip(*apart.values(), strict=True))
    worst = max(apart, key=lambda name: apart[name][0] / max(apart[name][1], 1e-30))
    return math.sqrt(total / max(norm, 1e-30)), worst, ""


_HEAD = ("strategy", "loss", "gradient norm", "weights", "tokens", "seconds", "")


def table_lines(rows: Sequence[StrategyResult], job: Verify) -> Iterator[str]:
    """Yield the table as aligned text."""
    yield from format_table([_HEAD, *(_cells(row, job) for row in rows)])


def as_markdown(rows: Sequence[StrategyResult], job: Verify, *, left_out: Mapping[str, str]) -> str:
    """Return the table in Markdown, with what was compared and what was not."""
    lines = [
        f"# Strategies against one process, {job.steps} steps",
        "",
        f"Relative differences, the largest of all steps; allowed: loss {job.loss_tolerance:g}, gradient norm "
        f"{job.grad_norm_tolerance:g}, and the same {job.generated_tokens} tokens generated greedily.",
        "",
    ]
    if job.perturb:
        lines += [f"The learning rate of every strategy but one process is off by {job.perturb:+.1%}, on purpose.", ""]
    lines += [markdown_row(_HEAD), markdown_row(["---"] * len(_HEAD))]
    lines += [markdown_row(_cells(row, job)) for row in rows]
    if left_out:
        lines += ["", "Left out:", "", *(f"- {name}: {why}" for name, why in left_out.items())]
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[StrategyResult], job: Verify, *, left_out: Mapping[str, str]) -> dict[str, Any]:
    """Return everything as plain data; a difference that is not finite is ``null``."""
    return {
        "steps": job.steps,
        "perturb": job.perturb,
        "loss_tolerance": job.loss_tolerance,
        "grad_norm_tolerance": job.grad_norm_tolerance,
        "strategies": {
            row.name: {"passed": row.excess(job) <= 1}
            | {key: plain_number(value) for key, value in dataclasses.asdict(row).items()}
            for row in rows
        },
        "left_out": dict(left_out),
    }


def plain_number(value: Any) -> Any:
    """Return a value as JSON takes it: ``None`` for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(row: StrategyResult, job: Verify) -> list[str]:
    why = row.why(job)
    if row.loss_diff == row.grad_norm_diff == math.inf and row.error:
        numbers = ["-"] * 4
    else:
        diffs = (row.loss_diff, row.grad_norm_diff, row.weights_diff)
        numbers = [*(f"{diff:.1e}" for diff in diffs), "equal" if row.tokens_equal else "differ"]
    return [row.name, *numbers, f"{row.seconds:.1f}", f"FAIL: {why}" if why else "ok"]


def markdown_row(cells: Sequence[str]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
