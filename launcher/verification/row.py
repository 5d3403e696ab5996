"""How far one strategy is from one process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.verification.fork import AT, TROUBLE, Answer

if TYPE_CHECKING:
    from launcher.jobs.verify import Verify


@dataclass(frozen=True, kw_only=True)
class Row:
    """One strategy; differences are relative, the largest of all steps, and infinite where a number is missing."""

    name: str
    seconds: float
    loss_diff: float = math.inf
    grad_norm_diff: float = math.inf
    weights_diff: float = math.inf
    """L2 norm of the difference of the final weights, against that of the reference's."""
    worst_weight: str = ""
    """The tensor that is farthest apart, by the same measure."""
    tokens_equal: bool = False
    trouble: str = ""
    """Why there is nothing to compare, or what does not fit besides the numbers."""

    def excess(self, job: Verify) -> float:
        """Return how many times the allowed difference it is away; 1 and less passes."""
        if self.trouble or not self.tokens_equal:
            return math.inf
        pairs = ((self.loss_diff, job.loss_tolerance), (self.grad_norm_diff, job.grad_norm_tolerance))
        return max((0.0 if diff == 0 else math.inf) if not allowed else diff / allowed for diff, allowed in pairs)

    def why(self, job: Verify) -> str:
        """Return what is wrong with it in words; empty where nothing is."""
        if self.trouble:
            return self.trouble
        said = []
        if not self.loss_diff <= job.loss_tolerance:
            said.append(f"loss differs by {self.loss_diff:.1e} (allowed {job.loss_tolerance:g})")
        if not self.grad_norm_diff <= job.grad_norm_tolerance:
            said.append(f"gradient norm differs by {self.grad_norm_diff:.1e} (allowed {job.grad_norm_tolerance:g})")
        if not self.tokens_equal:
            said.append("other tokens are generated")
        return ", ".join(said)


def row_of(name: str, answers: Mapping[int, Answer], reference: Answer, *, seconds: float) -> Row:
    """Compare what the ranks of a case answered with what one process did."""
    troubled = [(answer[AT], rank) for rank, answer in answers.items() if TROUBLE in answer]
    if troubled:
        rank = min(troubled)[1]  # the first to fail: others fail because of it
        return Row(name=name, seconds=seconds, trouble=f"rank {rank}: {answers[rank][TROUBLE]}")
    ours = answers[0]
    weights, worst, trouble = _weights([answer["weights"] for answer in answers.values()])
    return Row(
        name=name,
        seconds=seconds,
        loss_diff=_largest(ours["losses"], reference["losses"]),
        grad_norm_diff=_largest(ours["grad_norms"], reference["grad_norms"]),
        weights_diff=weights,
        worst_weight=worst,
        tokens_equal=all(answer["generated"] == reference["generated"] for answer in answers.values()),
        trouble=trouble,
    )


def _largest(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float:
    return max(_relative(one, other) for one, other in zip(ours, theirs, strict=True))


def _relative(one: float | None, other: float | None) -> float:
    if one is None or other is None or not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return 0.0 if one == other else abs(one - other) / max(abs(other), 1e-30)


def _weights(parts: Sequence[Mapping[str, Any]]) -> tuple[float, str, str]:
    """Return the relative difference of all weights, the tensor that is farthest apart, and what does not fit."""
    apart: dict[str, tuple[float, float]] = {}
    for part in parts:
        apart |= {name: (square, of) for name, (square, of) in part["apart"].items()}
    missing = set(parts[0]["all"]) - apart.keys()
    unknown = [name for part in parts for name in part["unknown"]]
    if missing or unknown:
        words = [("no rank gave", sorted(missing)), ("the reference has no such", unknown)]
        return math.inf, "", "; ".join(f"{text} {', '.join(names[:3])}" for text, names in words if names)
    total, norm = (math.fsum(column) for column in zip(*apart.values(), strict=True))
    worst = max(apart, key=lambda name: apart[name][0] / max(apart[name][1], 1e-30))
    return math.sqrt(total / max(norm, 1e-30)), worst, ""
