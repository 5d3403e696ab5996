"""Options of monitoring: objectives that alerts compare with, and ``deploy=monitoring``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.deploy.base import RenderedDeploy, UnusedOptions
from launcher.config.job.serve import Serve
from launcher.config.job.train import Train
from launcher.config.run import Deploy, Run
from launcher.config.tracker import PrometheusTracker
from launcher.errors import ConfigError
from launcher.protocol.plan import Host, Plan
from launcher.protocol.serving_metrics import TTFT_BUCKETS

FAST_BURN = 14.4
"""Multiple of the budget at which the fastest alert fires: 2 % of 30 days' in one hour.
From "Alerting on SLOs" in The Site Reliability Workbook (Google, 2018)."""
SLO_OPTIONS = ("slo_ttft_s", "slo_ttft_share", "slo_success_share")
"""Options that alerts of a server alone compare with."""
_TARGET = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})")


@dataclass(frozen=True, kw_only=True)
class MonitoredDeploy(RenderedDeploy):
    """A deployment with rules for alerts, and what these compare with."""

    scrape_every_s: int = 15
    """Seconds between scrapes."""

    slo_ttft_s: float = 2.5
    """Time to first token that is fast enough; an upper bound of the histogram's buckets."""

    slo_ttft_share: float = 0.95
    """Share of requests that must be that fast."""

    slo_success_share: float = 0.999
    """Share of requests that must not fail, time out or find the queue full.
    Those that are wrong, or that the client leaves, do not count."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject objectives that no alert could compare with."""
        yield from super().validate()
        yield from self.validate_minimum(1, "scrape_every_s")
        if self.slo_ttft_s not in TTFT_BUCKETS:
            bounds = ", ".join(f"{bound:g}" for bound in TTFT_BUCKETS)
            nearest = min(TTFT_BUCKETS, key=lambda bound: abs(bound - self.slo_ttft_s))
            why = f"is no upper bound of the histogram's buckets ({bounds})"
            yield self.error("slo_ttft_s", why, f"set deploy.slo_ttft_s={nearest:g}")
        for name in ("slo_ttft_share", "slo_success_share"):
            share = getattr(self, name)
            if not 0 < share < 1:
                yield self.error(name, "must lie between 0 and 1", f"set deploy.{name}=0.99")
            elif FAST_BURN * (1 - share) >= 1:
                why = (
                    f"leaves a budget of {1 - share:g}, and the alert needs {FAST_BURN} × {1 - share:g} = "
                    f"{FAST_BURN * (1 - share):.3g} of all requests to miss it, so it never fires"
                )
                yield self.error(name, why, f"set deploy.{name}=0.95 or more")


@dataclass(frozen=True, kw_only=True)
class MonitoringDeploy(MonitoredDeploy):
    """Prometheus' configuration, alerts and a Grafana dashboard, of a server or a training run."""

    kind: ClassVar[str] = "monitoring"
    summary_fields: ClassVar[tuple[str, ...]] = ("out", "targets")

    targets: tuple[str, ...] = ()
    """Addresses to scrape, ``host:port`` each; by default the server's or the tracker's own."""

    alertmanagers: tuple[str, ...] = ()
    """Addresses of Alertmanagers that get the alerts, ``host:port`` each."""

    stalled_s: int = 300
    """Seconds without a step after which training counts as stalled.
    Evaluations and saves must take less. A run without any progress ends after ``backend.stall_timeout_s`` (600), so
    a longer time is for runs with long evaluations."""

    goodput_share: float = 0.5
    """Share of half an hour below which steps take too little of the time of a training run."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject addresses without a port, and thresholds that mean nothing."""
        yield from super().validate()
        yield from self.validate_minimum(1, "stalled_s")
        if not 0 < self.goodput_share < 1:
            yield self.error("goodput_share", "must lie between 0 and 1", "set deploy.goodput_share=0.5")
        for name in ("targets", "alertmanagers"):
            targets = getattr(self, name)
            for target in targets:
                found = _TARGET.fullmatch(target)
                if found is None or not 0 < int(found[2]) < 65536:
                    fix = f"write it like deploy.{name}=[node1:8000], without http://"
                    yield ConfigError(f"deploy.{name}", target, why="is no address with a port", fix=fix)
            for target in sorted({each for each in targets if targets.count(each) > 1}):
                yield ConfigError(f"deploy.{name}", target, why="is there twice", fix="name every address once")

    def hosts(self, run: Run) -> tuple[Host, ...]:
        """Return the hosts of a training run, or one host for a server."""
        if isinstance(run.job, Train):
            return run.backend.hosts(max_ranks=run.job.max_ranks(run))
        return super().hosts(run)

    def unused_options(self, run: Run) -> Iterator[UnusedOptions]:
        """Add thresholds of the other kind of job."""
        yield from super().unused_options(run)
        if isinstance(run.job, Serve):
            why = f"is a threshold of training, and job={run.job.kind} trains nothing"
            yield UnusedOptions(("stalled_s", "goodput_share"), why)
        elif isinstance(run.job, Train):
            yield UnusedOptions(SLO_OPTIONS, f"is an objective of servers, and job={run.job.kind} serves nothing")

    def validate_run(self, run: Run, plan: Plan) -> Iterator[ConfigError]:
        """Reject what exports no metrics, and options without effect."""
        yield from Deploy.validate_run(self, run, plan)
        yield from self.validate_used(run)
        if isinstance(run.job, Train):
            if tracker_of(run) is None:
                why = "exports no metrics"
                yield ConfigError("tracker", run.tracker.kind, why=why, fix="set tracker=prometheus")
        elif not isinstance(run.job, Serve):
            why = "exports no metrics: servers and training runs do"
            yield ConfigError("job", run.job.kind, why=why, fix="set job=serve, or job=train tracker=prometheus")

    def targets_of(self, run: Run) -> tuple[str, ...]:
        """Return the addresses to scrape."""
        found = run.job if isinstance(run.job, Serve) else tracker_of(run)
        assert found is not None, "validate_run accepts what exports metrics alone"
        host = "localhost" if found.host in ("0.0.0.0", "::") else found.host  # noqa: S104 (compared, not bound)
        return self.targets or (f"[{host}]:{found.port}" if ":" in host else f"{host}:{found.port}",)


def tracker_of(run: Run) -> PrometheusTracker | None:
    """Return the tracker that exports the metrics of a run, if it has one."""
    return next((each for each in run.tracker.members if isinstance(each, PrometheusTracker)), None)
