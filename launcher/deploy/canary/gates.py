"""Gates of a canary: queries with limits, and what Prometheus answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from launcher.config.deploy.canary import CanaryDeploy
from launcher.config.run import Run
from launcher.deploy.monitoring.queries import ServingQueries, queries_of
from launcher.protocol.serving_metrics import SHARED_PREFIX, TTFT

Ask = Callable[[str], float | None]
"""Answers a query with one number; ``None`` without data."""
BETWEEN_TOKENS = f"{SHARED_PREFIX}inter_token_latency_seconds"


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What must hold of the new version."""

    name: str
    option: str
    """With the limit."""
    query: str
    limit: float
    """Largest value, or least one.
    With a query of the baseline it is a multiple of that one's value."""
    is_least: bool = False
    baseline_query: str | None = None
    unit: str = "s"


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """What Prometheus said of one gate."""

    gate: Gate
    value: float | None
    """Of the new version; ``None`` without data."""
    limit: float | None
    """``None`` where the baseline has too few requests, or no data."""

    @property
    def is_judged(self) -> bool:
        """Whether there is something to compare."""
        return self.value is not None and self.limit is not None

    @property
    def has_failed(self) -> bool:
        """Whether the value lies beyond the limit."""
        if self.value is None or self.limit is None:
            return False
        return self.value < self.limit if self.gate.is_least else self.value > self.limit

    def __str__(self) -> str:
        """Say value and limit in one clause."""
        if self.value is None:
            return f"{self.gate.name}: no data"
        shown = f"{self.gate.name} {_number(self.value, self.gate.unit)}"
        if self.limit is None:
            return f"{shown}: not judged, the baseline has too few requests"
        return f"{shown} (at {'least' if self.gate.is_least else 'most'} {_number(self.limit, self.gate.unit)})"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One look at the new version."""

    num_requests: float
    min_requests: int
    results: tuple[GateResult, ...] = ()
    problem: str | None = None
    """Why the new version cannot serve at all."""
    unanswered: str | None = None
    """Why Prometheus, or the cluster, did not answer."""

    @property
    def is_judged(self) -> bool:
        """Whether it passed or failed."""
        if self.problem is not None:
            return True
        is_enough = self.unanswered is None and self.num_requests >= self.min_requests
        return is_enough and any(each.is_judged for each in self.results)

    @property
    def failed(self) -> tuple[GateResult, ...]:
        """Gates that failed, if anything was judged."""
        return tuple(each for each in self.results if each.has_failed) if self.is_judged else ()

    @property
    def has_failed(self) -> bool:
        """Whether a gate failed, or the new version cannot serve."""
        return self.problem is not None or bool(self.failed)

    @property
    def why(self) -> str:
        """Say what failed with query, value and limit, or why nothing was judged."""
        if self.problem is not None:
            return self.problem
        if self.failed:
            return "; ".join(f"{each}, {each.gate.option}: {each.gate.query}" for each in self.failed)
        if self.unanswered is not None:
            return self.unanswered
        if self.num_requests < self.min_requests:
            return f"{self.num_requests:.0f} requests, and deploy.canary_min_requests={self.min_requests}"
        return "Prometheus has no data for any gate"


def gates_of(run: Run, *, canary: Sequence[str], baseline: Sequence[str], window: str) -> Iterator[Gate]:
    """Yield the gates of a run.

    Args:
        run: with a deployment that has a canary.
        canary: matchers of the series of the new version.
        baseline: matchers of those of the baseline.
        window: time that each query covers, as PromQL writes it.
    """
    options = run.deploy
    assert isinstance(options, CanaryDeploy), options.kind
    new, old = (queries_of(run, *matchers, by="") for matchers in (canary, baseline))
    if options.canary_failure_share is not None:
        yield Gate(
            name="share of failed requests",
            option=f"deploy.canary_failure_share={options.canary_failure_share:g}",
            query=f"{new.failures_or_none(window)} / {new.requests(window)}",
            limit=options.canary_failure_share,
            unit="%",
        )
    if options.canary_ttft_p95_s is not None:
        yield Gate(
            name="p95 time to first token",
            option=f"deploy.canary_ttft_p95_s={options.canary_ttft_p95_s:g}",
            query=_ttft(new, window),
            limit=options.canary_ttft_p95_s,
        )
    if options.canary_tokens_per_s is not None:
        yield Gate(
            name="tokens/s of a stream",
            option=f"deploy.canary_tokens_per_s={options.canary_tokens_per_s:g}",
            query=f"1 / ({new.mean(BETWEEN_TOKENS, window)})",
            limit=options.canary_tokens_per_s,
            is_least=True,
            unit="",
        )
    if options.canary_slowdown is not None:
        option = f"deploy.canary_slowdown={options.canary_slowdown:g}"
        pairs = {
            "p95 time to first token beside the baseline": (_ttft(new, window), _ttft(old, window)),
            "time between tokens beside the baseline": (
                new.mean(BETWEEN_TOKENS, window),
                old.mean(BETWEEN_TOKENS, window),
            ),
        }
        for name, (query, other) in pairs.items():
            yield Gate(name=name, option=option, query=query, baseline_query=other, limit=options.canary_slowdown)


def check_gates(
    run: Run, ask: Ask, *, canary: Sequence[str], baseline: Sequence[str], window_s: float, min_requests: int
) -> Check:
    """Return what Prometheus says of all gates.

    Args:
        run: with a deployment that has a canary.
        ask: answers queries.
        canary: matchers of the series of the new version.
        baseline: matchers of those of the baseline.
        window_s: seconds that the queries cover, until now.
        min_requests: without which nothing is judged.
    """
    window = f"{max(1, round(window_s))}s"

    def count(matchers: Sequence[str]) -> float:
        return (ask(queries_of(run, *matchers, by="").requests(window)) or 0.0) * max(1, round(window_s))

    num_requests, results = count(canary), []
    if num_requests < min_requests:
        return Check(num_requests=num_requests, min_requests=min_requests)
    is_comparable = count(baseline) >= min_requests
    for gate in gates_of(run, canary=canary, baseline=baseline, window=window):
        limit: float | None = gate.limit
        if gate.baseline_query is not None:
            usual = ask(gate.baseline_query) if is_comparable else None
            limit = gate.limit * usual if usual is not None else None
        results.append(GateResult(gate=gate, value=ask(gate.query), limit=limit))
    return Check(num_requests=num_requests, min_requests=min_requests, results=tuple(results))


def _ttft(queries: ServingQueries, window: str) -> str:
    return queries.quantile(TTFT, window, quantile=0.95)


def _number(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return f"{value}"
    if unit == "%":
        return f"{100 * value:.3g} %"
    return f"{value:.3g} {unit}".strip()
