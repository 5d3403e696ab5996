"""Options of a canary: steps of weight, the gates between them, and where their metrics are."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar, Self

from launcher.config.deploy.base import RenderedDeploy
from launcher.config.run import Run
from launcher.config.urls import HTTP, validate_url
from launcher.errors import ConfigError
from launcher.protocol.plan import Plan
from launcher.protocol.serving_metrics import TTFT_BUCKETS

_GATES = ("canary_failure_share", "canary_ttft_p95_s", "canary_tokens_per_s", "canary_slowdown")
_COUNTS = (
    *("canary_interval_s", "canary_checks", "canary_failure_limit", "canary_min_requests"),
    "canary_deadline_s",
)


@dataclass(frozen=True, kw_only=True)
class CanaryDeploy(RenderedDeploy):
    """A deployment in which a new version gets requests step by step, as long as its gates pass."""

    canary_option: ClassVar[str]
    """How a user adds a canary."""
    share_option: ClassVar[str]
    """The option that holds the weights."""

    canary_steps: tuple[int, ...] = (5, 25, 50, 100)
    """Percent of the requests that the new version gets, one step after the other."""

    canary_interval_s: int = 60
    """Seconds between two checks of the gates; each check covers the time since the step began."""

    canary_checks: int = 3
    """Checks that must pass before the next step."""

    canary_failure_limit: int = 2
    """Failed checks, over all steps, at which all requests go back to the baseline."""

    canary_min_requests: int = 20
    """Requests to the new version since the step began; with fewer nothing is judged."""

    canary_deadline_s: int = 3600
    """Seconds without a judgement after which all requests go back to the baseline."""

    canary_failure_share: float | None = 0.01
    """Gate: largest share of requests that fail; ``null`` has no such gate.
    A request fails as in ``deploy.slo_success_share``."""

    canary_ttft_p95_s: float | None = 2.5
    """Gate: largest 95th percentile of the time to the first token, in seconds."""

    canary_tokens_per_s: float | None = None
    """Gate: least tokens per second of one stream, the mean over requests."""

    canary_slowdown: float | None = 1.5
    """Gate: how many times those of the baseline both times may be.
    They are the 95th percentile to the first token and the mean between tokens. Without enough requests to the
    baseline it is not judged."""

    canary_prometheus: str | None = None
    """Address at which ``launch deploy promote`` asks Prometheus: ``http://localhost:9090``."""

    @property
    @abstractmethod
    def has_canary(self) -> bool:
        """Whether a new version runs beside another one."""

    @property
    @abstractmethod
    def canary_share(self) -> int:
        """Percent of the requests that the new version gets."""

    @property
    @abstractmethod
    def version_names(self) -> tuple[str, str]:
        """Names of the baseline and of the new version."""

    @abstractmethod
    def with_canary_share(self, percent: int) -> Self:
        """Return the same options with another share of the new version."""

    @property
    def gate_prometheus(self) -> str | None:
        """Address of the Prometheus that gates are read from."""
        return self.canary_prometheus

    def canary_warnings(self) -> Iterator[str]:
        """Yield why ``launch deploy promote`` could not judge this canary."""
        if self.has_canary and self.gate_prometheus is None:
            yield "deploy.canary_prometheus names no Prometheus, and launch deploy promote reads its gates there"

    def validate_run(self, run: Run, plan: Plan) -> Iterator[ConfigError]:
        """Reject a gate that no value can fail."""
        yield from super().validate_run(run, plan)
        limit, largest = self.canary_ttft_p95_s, TTFT_BUCKETS[-1]
        if self.has_canary and limit is not None and limit >= largest and getattr(run.job, "engine", None) != "vllm":
            why = f"never fails: the server counts times up to {largest:g} s, and longer ones as these"
            yield self.error("canary_ttft_p95_s", why, "set deploy.canary_ttft_p95_s=2.5, or null")

    def validate(self) -> Iterator[ConfigError]:
        """Reject steps that do not rise to 100, gates without sense, and no baseline."""
        yield from super().validate()
        if not self.has_canary:
            for each in fields(CanaryDeploy):
                if each.name.startswith("canary_") and getattr(self, each.name) != each.default:
                    why = "there is no canary"
                    yield self.error(each.name, why, f"set {self.canary_option}, or leave it out")
            return
        yield from self.validate_minimum(1, *_COUNTS)
        steps = self.canary_steps
        rising = all(low < high for low, high in zip((0, *steps), steps, strict=False))
        if not rising or steps[-1:] != (100,):
            fix = "set deploy.canary_steps=[5,25,50,100]"
            yield self.error("canary_steps", "must rise from at least 1 to 100 percent, the last step", fix)
        if self.canary_deadline_s < self.canary_interval_s:
            why = f"is less than deploy.canary_interval_s={self.canary_interval_s}, so nothing could be judged"
            yield self.error("canary_deadline_s", why, f"set deploy.canary_deadline_s={60 * self.canary_interval_s}")
        yield from self._validate_gates()

    def _validate_gates(self) -> Iterator[ConfigError]:
        if all(getattr(self, name) is None for name in _GATES):
            why = "all gates are null, so every version would pass"
            yield self.error("canary_failure_share", why, "set deploy.canary_failure_share=0.01")
        share = self.canary_failure_share
        if share is not None and not 0 <= share < 1:
            yield self.error("canary_failure_share", "must lie between 0 and 1", "set deploy.canary_failure_share=0.01")
        for name, least in {"canary_ttft_p95_s": 0, "canary_tokens_per_s": 0, "canary_slowdown": 1}.items():
            value = getattr(self, name)
            if value is not None and not least < value < math.inf:
                yield self.error(name, f"must be a number above {least}", f"set deploy.{name}=2.5, or null")
        if self.canary_prometheus is not None:
            option, example = "deploy.canary_prometheus", "http://localhost:9090"
            yield from validate_url(
                option, self.canary_prometheus, what="the address of Prometheus", example=example, schemes=HTTP
            )


def split_weights(percent: int, *, num_baseline: int, num_canary: int, limit: int) -> tuple[int, int]:
    """Return the weights of one server of the baseline and one of the canary.

    Args:
        percent: of the requests that all servers of the canary get together.
        num_baseline: servers of the baseline.
        num_canary: servers of the canary.
        limit: largest weight that the load balancer knows.
    """
    canary, baseline = percent * num_baseline, (100 - percent) * num_canary
    divisor = math.gcd(canary, baseline)
    canary, baseline = canary // divisor, baseline // divisor
    largest = max(canary, baseline)
    if largest > limit:
        canary, baseline = (max(1, round(each * limit / largest)) if each else 0 for each in (canary, baseline))
    return baseline, canary


def share_of_weights(baseline: float, canary: float) -> float:
    """Return the percent that the canary gets, from the sums of both versions' weights."""
    return 100 * canary / (baseline + canary) if baseline + canary else 0.0
