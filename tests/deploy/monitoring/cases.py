"""Series for which each alert fires, and for which it does not, in promtool's notation: a value a minute."""

from __future__ import annotations

from dataclasses import dataclass, field

_COUNT, _FAST = "vllm:time_to_first_token_seconds_count", 'vllm:time_to_first_token_seconds_bucket{le="2.5"'
_OK, _FAILED = "vllm:request_success_total", 'launcher:request_failure_total{reason="error"'
_LEFT, _FULL = (
    'launcher:request_failure_total{reason="abandoned"',
    'launcher:requests_rejected_total{reason="queue_full"',
)
_SERVER = 'job="chat",instance="a:8000"'
_RUN = 'run_name="tiny",run_id="7"'


@dataclass(frozen=True)
class Case:
    """What Prometheus has scraped for 75 minutes; alerts are compared after 70."""

    alert: str
    fires: bool
    series: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)


def _ttft(alert: str, *, fires: bool, fast: str) -> Case:
    series = {f"{_COUNT}{{{_SERVER}}}": "0+60x75", f"{_FAST},{_SERVER}}}": fast}
    return Case(alert, fires, series, {"job": "chat"})


def _errors(alert: str, *, fires: bool, failed: str, full: str = "0+0x75") -> Case:
    values = {f"{_OK}{{": "0+600x75", f"{_FAILED},": failed, f"{_LEFT},": "0+600x75", f"{_FULL},": full}
    return Case(alert, fires, {f"{name}{_SERVER}}}": each for name, each in values.items()}, {"job": "chat"})


def _server(alert: str, *, fires: bool, labels: str = "", **values: str) -> Case:
    more = {"model_name": "tiny"} if "model_name" in labels else {}
    series = {f"{name.replace('__', ':')}{{{_SERVER}{labels}}}": each for name, each in values.items()}
    return Case(alert, fires, series, {"job": "chat", "instance": "a:8000", **more})


def _run(alert: str, *, fires: bool, **values: str) -> Case:
    phases = {"forward", "data"}
    series = {
        f'launcher:train_phase_seconds_total{{phase="{name}",{_RUN}}}'
        if name in phases
        else f"launcher:{name}{{{_RUN}}}": each
        for name, each in values.items()
    }
    return Case(alert, fires, series, {"run_name": "tiny", "run_id": "7"})


_MODEL = ',model_name="tiny"'

SERVING = (
    _ttft("ServingTtftBudgetBurnsFast", fires=True, fast="0+6x75"),
    _ttft("ServingTtftBudgetBurnsFast", fires=False, fast="0+48x75"),
    _ttft("ServingTtftBudgetBurnsSlowly", fires=True, fast="0+48x75"),
    _ttft("ServingTtftBudgetBurnsSlowly", fires=False, fast="0+59x75"),
    _errors("ServingErrorBudgetBurnsFast", fires=True, failed="0+30x75"),
    _errors("ServingErrorBudgetBurnsFast", fires=True, failed="0+0x75", full="0+30x75"),
    _errors("ServingErrorBudgetBurnsFast", fires=False, failed="0+3x75"),
    _errors("ServingErrorBudgetBurnsSlowly", fires=True, failed="0+3x75"),
    _errors("ServingErrorBudgetBurnsSlowly", fires=False, failed="0+0.3x75"),
    Case(
        "ServingQueueGrows",
        True,
        {f"vllm:num_requests_waiting{{{_SERVER}}}": "0+1x75"},
        {"job": "chat"},
    ),
    Case("ServingQueueGrows", False, {f"vllm:num_requests_waiting{{{_SERVER}}}": "70+0x75"}),
    Case("ServingQueueGrows", False, {f"vllm:num_requests_waiting{{{_SERVER}}}": "0+0.1x75"}),
    _server("ServingKvCacheNearlyFull", fires=True, labels=_MODEL, vllm__kv_cache_usage_perc="0.95+0x75"),
    _server("ServingKvCacheNearlyFull", fires=False, labels=_MODEL, vllm__kv_cache_usage_perc="0.85+0x75"),
    _server("ServingRestarts", fires=True, launcher__engine_restarts_total="0+0x60 1+0x15"),
    _server("ServingRestarts", fires=True, labels=_MODEL, vllm__prompt_tokens_total="0+60x65 0+60x10"),
    _server(
        "ServingRestarts", fires=False, launcher__engine_restarts_total="3+0x75", vllm__prompt_tokens_total="0+60x75"
    ),
    _server("ServingDown", fires=True, up="1+0x60 0+0x15"),
    _server("ServingDown", fires=False, up="1+0x75"),
)
"""For ``deploy.name=chat`` and ``job.max_num_seqs=8``, with the default objectives."""

TRAINING = (
    _run("TrainingStalled", fires=True, train_last_step_timestamp_seconds="0+60x50 3000+0x25"),
    _run("TrainingStalled", fires=False, train_last_step_timestamp_seconds="0+60x66 3960+0x9"),
    _run("TrainingStalled", fires=False, train_last_step_timestamp_seconds="0+60x50 3000+0x25", run_exit_code="0+0x75"),
    _run("TrainingLossNotFinite", fires=True, train_nonfinite_steps_total="0+0x60 1+0x15"),
    _run("TrainingLossNotFinite", fires=False, train_nonfinite_steps_total="1+0x75"),
    _run("TrainingRepeatsSteps", fires=True, train_repeated_steps_total="0+0x60 40+0x15"),
    _run("TrainingRepeatsSteps", fires=False, train_repeated_steps_total="40+0x75"),
    _run("TrainingGoodputLow", fires=True, forward="0+6x75", data="0+50x75", train_step="0+1x75"),
    _run("TrainingGoodputLow", fires=False, forward="0+50x75", data="0+6x75", train_step="0+1x75"),
    _run("TrainingGoodputLow", fires=False, forward="_x53 0+40x22", train_step="_x53 0+1x22"),
    _run("TrainingGoodputLow", fires=False, forward="0+40x45 stale", data="0+15x45 stale", train_step="0+1x45 stale"),
    _run("TrainingFailed", fires=True, run_exit_code="_x65 1 _x9"),
    _run("TrainingFailed", fires=False, run_exit_code="_x65 0 _x9"),
    *(_run("TrainingFailed", fires=False, run_exit_code=f"_x65 {code} _x9") for code in (75, 129, 130, 143)),
)
"""With the default thresholds: 300 s without a step, half of the time in steps."""

VLLM = (
    Case(
        "ServingErrorBudgetBurnsFast",
        True,
        {
            f'http_requests_total{{handler="/v1/completions",status="{status}",{_SERVER}}}': values
            for status, values in {"2xx": "0+600x75", "5xx": "0+30x75"}.items()
        },
        {"job": "chat"},
    ),
    Case(
        "ServingErrorBudgetBurnsFast",
        False,
        {
            f'http_requests_total{{handler="{handler}",status="{status}",{_SERVER}}}': "0+600x75"
            for handler, status in (("/v1/completions", "2xx"), ("/v1/completions", "4xx"), ("/metrics", "5xx"))
        },
    ),
)
"""What differs with ``job.engine=vllm``."""
