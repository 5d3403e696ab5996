"""What a stretch of load says about a server: percentiles, throughput, goodput."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.benchmarks.load.drive import Load
from launcher.benchmarks.load.outcome import Outcome

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What an answer must keep to be a good one; ``None`` asks for nothing."""

    first_s: float | None = None
    """Time to the first token."""
    per_token_s: float | None = None
    """Mean time a token after it."""
    whole_s: float | None = None
    """Time to the end."""

    def is_kept_by(self, outcome: Outcome) -> bool:
        """Return whether a whole answer came, in time."""
        if not outcome.is_good or not outcome.chunks_s:
            return False
        found = (
            (self.first_s, outcome.first_s),
            (self.per_token_s, outcome.per_token_s or 0.0),
            (self.whole_s, outcome.whole_s),
        )
        return all(most is None or value <= most for most, value in found)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` percent lie, between neighbours where need be (numpy's ``linear``)."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def figures(load: Load, *, slo: Slo) -> dict[str, float]:
    """Return the figures of a stretch of load by name; times end in ``_s``.

    ``first`` is the time to the first token, ``per_token`` the mean time a token after it, ``gap`` the time between one
    piece of a stream and the next, ``whole`` the time to the end. ``late`` is how much later than due a call was sent.
    """
    good = [outcome for outcome in load.outcomes if outcome.is_good]
    errors = Counter(outcome.error for outcome in load.outcomes if not outcome.is_good)
    found: dict[str, float] = {
        "requests": len(good),
        "errors": sum(count for kind, count in errors.items() if kind != "unfinished"),
        "unfinished": errors.get("unfinished", 0),
        "elapsed_s": load.elapsed_s,
        "requests_per_s": len(good) / load.elapsed_s,
        "goodput_per_s": sum(map(slo.is_kept_by, load.outcomes)) / load.elapsed_s,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in good),
        "tokens_per_s": tokens_between(load.outcomes, 0.0, load.elapsed_s) / load.elapsed_s,
        "client_share": load.cpu_s / load.elapsed_s,
        "late_p99_s": percentile([outcome.sent_s - outcome.due_s for outcome in load.outcomes], 99),
    }
    told = [outcome for outcome in good if outcome.chunks_s]
    columns = {
        "first": [outcome.first_s for outcome in told],
        "per_token": [outcome.per_token_s for outcome in told if outcome.per_token_s is not None],
        "gap": [gap for outcome in told for gap in outcome.gaps_s],
        "whole": [outcome.whole_s for outcome in told],
    }
    for name, values in columns.items():
        found |= {f"{name}_p{share}_s": percentile(values, share) for share in PERCENTILES}
        found[f"{name}_mean_s"] = statistics.fmean(values) if values else math.nan
    return found | {f"error/{kind}": count for kind, count in sorted(errors.items())}


def tokens_between(outcomes: Sequence[Outcome], from_s: float, to_s: float) -> float:
    """Return the tokens that came within a stretch of time, those of answers cut off at its end included.

    A piece of a stream may hold several tokens: each counts as its share of those of its answer, and where an answer
    never told how many those are, as the others' pieces on average.
    """
    told = [outcome for outcome in outcomes if outcome.is_good and outcome.chunks_s]
    pieces = sum(len(outcome.chunks_s) for outcome in told)
    usual = sum(outcome.tokens for outcome in told) / pieces if pieces else 1.0
    total = 0.0
    for outcome in outcomes:
        if outcome.chunks_s:
            worth = outcome.tokens / len(outcome.chunks_s) if outcome.is_good else usual
            total += worth * sum(from_s <= at <= to_s for at in outcome.chunks_s)
    return total
