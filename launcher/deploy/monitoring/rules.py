"""Recording and alert rules of servers and training runs, in Prometheus' format."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.config.deploy.monitoring import FAST_BURN, MonitoredDeploy, MonitoringDeploy
from launcher.config.job.serve import Serve
from launcher.config.job.train import Train
from launcher.config.run import Run
from launcher.deploy.monitoring.queries import queries_of
from launcher.errors import EXIT_PREEMPTED
from launcher.protocol.serving_metrics import KV_CACHE_USAGE, NUM_WAITING, SHARED_PREFIX

Rule = dict[str, Any]

SLOW_SHARE, FAILURE_SHARE = "job:serving_slow:ratio_rate", "job:serving_failures:ratio_rate"
"""Recorded shares of requests that missed an objective; the window is appended."""
WAITING = "job:serving_waiting:avg"
"""Recorded mean queue of a server."""
GOODPUT = "run:train_goodput:ratio_rate30m"
"""Recorded share of time in which rank 0 computed steps."""
_OVERHEAD = "load|data|evaluate|checkpoint|sample|curve"
"""Phases in which no step is computed."""
_BURNS = {
    "Fast": ((FAST_BURN, "5m", "1h"), (6.0, "30m", "6h")),
    "Slowly": ((3.0, "2h", "1d"), (1.0, "6h", "3d")),
}
"""Multiples of the budget, each with a short and a long window.
From "Alerting on SLOs" in The Site Reliability Workbook. The short window lets an alert end soon after its cause."""
_WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
_NO_FAILURE = (EXIT_PREEMPTED, *(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)))
"""Exit codes of runs that were preempted or cancelled."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One alert rule."""

    name: str
    expr: str
    lasts: str
    """How long the expression must hold."""
    severity: str
    """``page``: a person must act now; ``ticket``: within days."""
    summary: str
    """May name labels: ``{{ $labels.job }}``."""
    action: str

    @property
    def rule(self) -> Rule:
        """The rule as Prometheus reads it."""
        annotations = {"summary": self.summary, "description": self.action}
        labels = {"severity": self.severity}
        return {"alert": self.name, "expr": self.expr, "for": self.lasts, "labels": labels, "annotations": annotations}


def rule_groups(run: Run) -> list[dict[str, Any]]:
    """Return the groups of rules for a server or a training run."""
    if isinstance(run.job, Train):
        recorded, alerts = list(_training_records()), list(training_alerts(run))
        return [_group("training.recorded", recorded), _group("training", [each.rule for each in alerts])]
    recorded, alerts = list(_serving_records(run)), list(serving_alerts(run))
    return [_group("serving.recorded", recorded), _group("serving", [each.rule for each in alerts])]


def _group(name: str, rules: list[Rule]) -> dict[str, Any]:
    return {"name": name, "rules": rules}


def _record(name: str, expr: str) -> Rule:
    return {"record": name, "expr": expr}


def _deploy(run: Run) -> MonitoredDeploy:
    assert isinstance(run.deploy, MonitoredDeploy), f"deploy={run.deploy.kind} has no objectives"
    return run.deploy


def _serving_records(run: Run) -> Iterator[Rule]:
    queries, deploy = queries_of(run), _deploy(run)
    for window in _WINDOWS:
        yield _record(f"{SLOW_SHARE}{window}", queries.slow_share(window, ttft_s=deploy.slo_ttft_s))
        yield _record(f"{FAILURE_SHARE}{window}", queries.failure_share(window))
    yield _record(WAITING, f"avg by (job) ({NUM_WAITING})")


def serving_alerts(run: Run) -> Iterator[Alert]:
    """Yield the alerts of servers."""
    assert isinstance(run.job, Serve), "other jobs serve nothing"
    deploy = _deploy(run)
    objectives = {
        "Ttft": (
            SLOW_SHARE,
            1 - deploy.slo_ttft_share,
            f"requests whose first token takes over {deploy.slo_ttft_s:g} s",
        ),
        "Error": (FAILURE_SHARE, 1 - deploy.slo_success_share, "requests that fail"),
    }
    actions = {
        "Ttft": "See the queue and the KV cache on the dashboard; add replicas, or lower job.max_num_seqs.",
        "Error": "See failures and rejections by reason on the dashboard, and the server's log.",
    }
    for name, (recorded, budget, what) in objectives.items():
        for speed, burns in _BURNS.items():
            yield Alert(
                name=f"Serving{name}BudgetBurns{speed}",
                expr=" or ".join(_burns(recorded, burn, budget, short, long) for burn, short, long in burns),
                lasts="2m" if speed == "Fast" else "15m",
                severity="page" if speed == "Fast" else "ticket",
                summary=f"{{{{ $labels.job }}}}: too many {what}",
                action=f"The objective allows {_percent(budget)}. {actions[name]}",
            )
    yield Alert(
        name="ServingQueueGrows",
        expr=f"{WAITING} > {run.job.capacity} and deriv({WAITING}[10m]) > 0",
        lasts="5m",
        severity="page",
        summary="{{ $labels.job }}: more sequences wait than engines work on, and their number grows",
        action="Add replicas, or lower job.max_queue so that clients are refused sooner.",
    )
    yield Alert(
        name="ServingKvCacheNearlyFull",
        expr=f"{KV_CACHE_USAGE} > 0.9",
        lasts="10m",
        severity="ticket",
        summary="{{ $labels.instance }}: the KV cache is nearly full",
        action="Sequences are preempted once it is full. Raise job.kv_cache_tokens, or lower job.max_num_seqs.",
    )
    yield Alert(
        name="ServingRestarts",
        expr=_restarts(is_vllm=run.job.engine == "vllm"),
        lasts="0m",
        severity="ticket",
        summary="{{ $labels.instance }}: an engine or the server was restarted",
        action="The server's log has the exit code or the signal of the process that ended.",
    )
    yield Alert(
        name="ServingDown",
        expr=f'up{{job="{deploy.object_name(run)}"}} == 0',
        lasts="2m",
        severity="page",
        summary="{{ $labels.instance }}: the server cannot be scraped",
        action="Prometheus cannot reach /metrics: the process has ended, or the network is cut.",
    )


def _restarts(*, is_vllm: bool) -> str:
    """Return a query for restarted engines, and for servers whose counters began again."""
    started_again = f"resets({SHARED_PREFIX}prompt_tokens_total[15m]) > 0"
    return started_again if is_vllm else f"increase(launcher:engine_restarts_total[15m]) > 0 or {started_again}"


def _burns(recorded: str, burn: float, budget: float, short: str, long: str) -> str:
    limit = f"{burn * budget:.6g}"
    return f"({recorded}{short} > {limit} and {recorded}{long} > {limit})"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def step_seconds(*matchers: str) -> str:
    """Return the counters of rank 0's seconds in phases that compute steps."""
    chosen = ", ".join((f'phase!~"{_OVERHEAD}"', *matchers))
    return f"launcher:train_phase_seconds_total{{{chosen}}}"


def _training_records() -> Iterator[Rule]:
    yield _record(GOODPUT, f"sum without (phase) (rate({step_seconds()}[30m]))")


def training_alerts(run: Run) -> Iterator[Alert]:
    """Yield the alerts of training runs."""
    deploy = run.deploy
    assert isinstance(deploy, MonitoringDeploy), "deploy.stalled_s is an option of this kind"
    who = "{{ $labels.run_name }} ({{ $labels.run_id }})"
    yield Alert(
        name="TrainingStalled",
        expr=(
            f"time() - launcher:train_last_step_timestamp_seconds > {deploy.stalled_s} "
            "unless on (run_id) launcher:run_exit_code"
        ),
        lasts="1m",
        severity="page",
        summary=f"{who}: no step for {deploy.stalled_s} s",
        action="`launch status RUN` names the phase of each rank; the run ends by itself at backend.stall_timeout_s.",
    )
    yield Alert(
        name="TrainingLossNotFinite",
        expr="increase(launcher:train_nonfinite_steps_total[15m]) > 0",
        lasts="0m",
        severity="page",
        summary=f"{who}: the loss was not finite",
        action="The step was skipped, or the run went back to a checkpoint. Lower optimizer.lr if it repeats.",
    )
    yield Alert(
        name="TrainingRepeatsSteps",
        expr="increase(launcher:train_repeated_steps_total[1h]) > 0",
        lasts="0m",
        severity="ticket",
        summary=f"{who}: steps were discarded and are trained again",
        action="A bad step or a restart took the run back to its newest checkpoint; see its log.",
    )
    yield Alert(
        name="TrainingGoodputLow",
        # Runs of at least half an hour that have not ended: in a window that outlasts a run its share only falls.
        expr=(
            f"{GOODPUT} < {deploy.goodput_share:g} and on (run_id) launcher:train_step offset 30m "
            "and on (run_id) launcher:train_step"
        ),
        lasts="15m",
        severity="ticket",
        summary=f"{who}: steps take less than {_percent(deploy.goodput_share)} of the time",
        action="The phases on the dashboard show what takes the rest: data, evaluations or checkpoints.",
    )
    yield Alert(
        name="TrainingFailed",
        expr="max_over_time(launcher:run_exit_code[15m]) > 0" + "".join(f" != {code}" for code in _NO_FAILURE),
        lasts="0m",
        severity="page",
        summary=f"{who}: the run failed",
        action="failure.json in its folder has the first rank that failed, and why; launch resume continues it.",
    )
