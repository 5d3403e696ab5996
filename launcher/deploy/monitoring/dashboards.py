"""Grafana dashboards of servers and training runs, as the JSON that Grafana imports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.config.deploy.monitoring import MonitoredDeploy
from launcher.config.job.train import Train
from launcher.config.run import Run
from launcher.deploy.monitoring.queries import queries_of
from launcher.deploy.monitoring.rules import FAILURE_SHARE, GOODPUT, SLOW_SHARE, step_seconds
from launcher.protocol.serving_metrics import (
    KV_CACHE_USAGE,
    NUM_RUNNING,
    NUM_WAITING,
    OWN_PREFIX,
    SHARED_PREFIX,
    TTFT,
)

_SCHEMA_VERSION = 39
"""Of the JSON: Grafana 10 and later."""
_COLUMNS, _WIDTH, _HEIGHT = 24, 8, 8
"""Columns of Grafana's grid; size of a panel."""
_RATE = "$__rate_interval"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
Unit = Literal["short", "s", "percentunit", "reqps", "ops", "bytes", "sci", "dateTimeAsIso"]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One graph."""

    title: str
    unit: Unit
    queries: tuple[tuple[str, str], ...]
    """Expression and legend of each series."""
    description: str = ""

    def model(self, number: int) -> dict[str, Any]:
        """Return its JSON, at the place that follows from its number."""
        x, y = number % (_COLUMNS // _WIDTH) * _WIDTH, number // (_COLUMNS // _WIDTH) * _HEIGHT
        targets = [
            {"refId": chr(ord("A") + at), "datasource": _SOURCE, "expr": expr, "legendFormat": legend, "range": True}
            for at, (expr, legend) in enumerate(self.queries)
        ]
        return {
            "id": number + 1,
            "type": "timeseries",
            "title": self.title,
            "description": self.description,
            "datasource": _SOURCE,
            "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
            "fieldConfig": {"defaults": {"unit": self.unit}, "overrides": []},
            "options": {
                "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
                "tooltip": {"mode": "multi", "sort": "none"},
            },
            "targets": targets,
        }


def dashboard(run: Run) -> dict[str, Any]:
    """Return the dashboard for a server or a training run."""
    if isinstance(run.job, Train):
        variables = [
            _variable("run_name", "Run", "label_values(launcher:train_step, run_name)"),
            _variable("run_id", "Run id", 'label_values(launcher:train_step{run_name=~"$run_name"}, run_id)'),
        ]
        return _model("launcher-training", "Training", variables, list(training_panels()))
    variables = [_variable("job", "Server", f"label_values({NUM_RUNNING}, job)")]
    return _model("launcher-serving", "Serving", variables, list(serving_panels(run)))


def serving_panels(run: Run) -> Iterator[Panel]:
    """Yield the graphs of servers; those of metrics that vLLM lacks only of other engines."""
    queries, servers = queries_of(run, 'job=~"$job"'), '{job=~"$job"}'
    assert isinstance(run.deploy, MonitoredDeploy), f"deploy={run.deploy.kind} has no objectives"
    budgets = ((SLOW_SHARE, 1 - run.deploy.slo_ttft_share), (FAILURE_SHARE, 1 - run.deploy.slo_success_share))
    slow, failed = (f"{recorded}1h{servers} / {budget:.6g}" for recorded, budget in budgets)
    yield Panel(
        title="Error budgets: multiples of the rate that uses them up",
        unit="short",
        queries=((slow, "{{job}} slow first tokens"), (failed, "{{job}} failures")),
        description="Above 1 the objective will be missed if the last hour repeats; 14.4 pages.",
    )
    yield Panel(title="Requests", unit="reqps", queries=((queries.requests(_RATE), "{{job}}"),))
    success = queries.rate(f"{SHARED_PREFIX}request_success_total", _RATE, by="finished_reason")
    yield Panel(title="Sequences by finish reason", unit="reqps", queries=((success, "{{finished_reason}}"),))
    if queries.is_vllm:
        yield Panel(title="Failures", unit="reqps", queries=((queries.failures(_RATE), "{{job}}"),))
    else:
        failures = queries.rate(f"{OWN_PREFIX}request_failure_total", _RATE, by="reason")
        rejections = queries.rate(f"{OWN_PREFIX}requests_rejected_total", _RATE, by="reason")
        yield Panel(
            title="Failures and rejections by reason",
            unit="reqps",
            queries=((failures, "failed: {{reason}}"), (rejections, "rejected: {{reason}}")),
        )
    yield _times(run, "Time to first token", TTFT)
    yield _times(run, "Time between tokens", f"{SHARED_PREFIX}inter_token_latency_seconds")
    yield _times(run, "Latency of a request", f"{SHARED_PREFIX}e2e_request_latency_seconds")
    parts = tuple(
        (queries.mean(f"{SHARED_PREFIX}request_{part}_time_seconds", _RATE), f"{{{{job}}}} {part}")
        for part in ("queue", "prefill", "decode")
    )
    yield Panel(title="Mean time of a request by part", unit="s", queries=parts)
    prompt = queries.rate(f"{SHARED_PREFIX}prompt_tokens_total", _RATE)
    tokens = ((prompt, "{{job}} prompt"), (queries.tokens_per_s(_RATE), "{{job}} generated"))
    yield Panel(title="Tokens per second", unit="short", queries=tokens)
    sequences = (
        (f"{NUM_RUNNING}{servers}", "{{instance}} running"),
        (f"{NUM_WAITING}{servers}", "{{instance}} waiting"),
    )
    yield Panel(title="Sequences running and waiting", unit="short", queries=sequences)
    yield Panel(title="KV cache", unit="percentunit", queries=((f"{KV_CACHE_USAGE}{servers}", "{{instance}}"),))
    hits, asked = (queries.rate(f"{SHARED_PREFIX}prefix_cache_{name}_total", _RATE) for name in ("hits", "queries"))
    yield Panel(
        title="Prefix cache: share of tokens found", unit="percentunit", queries=((f"{hits} / {asked}", "{{job}}"),)
    )
    preempted = queries.rate(f"{SHARED_PREFIX}num_preemptions_total", _RATE)
    yield Panel(title="Preempted sequences per second", unit="short", queries=((preempted, "{{job}}"),))
    if queries.is_vllm:
        return
    kept, missed = (queries.rate(f"{OWN_PREFIX}result_cache_{name}_total", _RATE) for name in ("hits", "misses"))
    share = f"{kept} / ({kept} + {missed})"
    yield Panel(title="Result cache: share of requests answered", unit="percentunit", queries=((share, "{{job}}"),))
    engines = (
        (f"{OWN_PREFIX}engines_ready{servers}", "{{instance}} ready"),
        (f"{OWN_PREFIX}engine_restarts_total{servers}", "{{instance}} restarts"),
    )
    yield Panel(title="Engines", unit="short", queries=engines)
    by_model = queries.rate(f"{OWN_PREFIX}generation_tokens_by_model_total", _RATE, by="model_name")
    yield Panel(title="Tokens per second by model or adapter", unit="short", queries=((by_model, "{{model_name}}"),))


def _times(run: Run, title: str, histogram: str) -> Panel:
    queries = queries_of(run, 'job=~"$job"')
    shown = tuple(
        (queries.quantile(histogram, _RATE, quantile=share), f"{{{{job}}}} p{100 * share:g}")
        for share in (0.5, 0.95, 0.99)
    )
    return Panel(title=title, unit="s", queries=shown)


def training_panels() -> Iterator[Panel]:
    """Yield the graphs of training runs."""
    chosen = 'run_name=~"$run_name", run_id=~"$run_id"'
    runs = f"{{{chosen}}}"

    def gauge(title: str, unit: Unit, *names: str) -> Panel:
        queries = tuple((f"launcher:{name}{runs}", f"{{{{run_id}}}} {name}") for name in names)
        return Panel(title=title, unit=unit, queries=queries)

    yield gauge("Loss", "short", "train_loss", "eval_loss")
    yield gauge("Gradient norm", "short", "train_grad_norm")
    yield gauge("Learning rate", "sci", "train_lr")
    done = f"launcher:train_step{runs} / launcher:train_num_steps{runs}"
    yield Panel(title="Steps done", unit="percentunit", queries=((done, "{{run_id}}"),))
    yield gauge("Tokens per second", "short", "perf_tokens_per_s")
    yield gauge("Model FLOP/s utilisation", "percentunit", "perf_mfu")
    phases = f"sum by (run_id, phase) (rate(launcher:train_phase_seconds_total{runs}[{_RATE}]))"
    yield Panel(title="Time by phase", unit="percentunit", queries=((phases, "{{run_id}} {{phase}}"),))
    now = f"clamp_max(sum by (run_id) (rate({step_seconds(chosen)}[{_RATE}])), 1)"  # rate extrapolates
    yield Panel(
        title="Goodput: share of time in steps",
        unit="percentunit",
        queries=((now, "{{run_id}} now"), (f"{GOODPUT}{runs}", "{{run_id}} half an hour")),
        description="The mean over half an hour counts the time before a younger run began as lost.",
    )
    since = f"time() - launcher:train_last_step_timestamp_seconds{runs}"
    yield Panel(title="Time since the last step", unit="s", queries=((since, "{{run_id}}"),))
    bad = tuple(
        (f"increase(launcher:train_{name}_steps_total{runs}[{_RATE}])", f"{{{{run_id}}}} {name}")
        for name in ("nonfinite", "skipped", "repeated")
    )
    yield Panel(title="Steps that were not finite, skipped or repeated", unit="short", queries=bad)
    yield gauge("Peak memory of rank 0", "bytes", "memory_peak_bytes")


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    """Return a choice among the values of a label."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "options": [],
        "hide": 0,
        "sort": 1,
        "regex": "",
        "skipUrlSync": False,
    }


def _model(uid: str, title: str, variables: Sequence[dict[str, Any]], panels: Sequence[Panel]) -> dict[str, Any]:
    source = {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "includeAll": False,
        "multi": False,
        "options": [],
        "hide": 0,
        "regex": "",
        "skipUrlSync": False,
    }
    return {
        "uid": uid,
        "title": title,
        "tags": ["launcher"],
        "schemaVersion": _SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "templating": {"list": [source, *variables]},
        "annotations": {"list": []},
        "links": [],
        "panels": [panel.model(number) for number, panel in enumerate(panels)],
    }
