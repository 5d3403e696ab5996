"""One run as ``/metrics`` for Prometheus, served while the run lasts.

Imports prometheus_client: sidecar only. A rank that hangs is still scraped, with the time of its last step.

Every name of metrics.jsonl is a gauge of its newest value (``train/loss`` is ``launcher:train_loss``); besides these
there are ``launcher:train_phase_seconds_total``, ``train_steps_total``, ``train_nonfinite_steps_total``,
``train_skipped_steps_total``, ``train_repeated_steps_total``, ``train_last_step_timestamp_seconds`` and, once the
run is over, ``run_exit_code``.
"""

from __future__ import annotations

import re
import socket
import socketserver
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from launcher.config.run import Run
from launcher.config.tracker import PrometheusTracker
from launcher.protocol.plan import Plan
from launcher.protocol.results import NUM_STEPS
from launcher.protocol.rundir import RunDir
from launcher.trackers.base import TrackedRun, TrackerFailed

_PREFIX = "launcher:"
LAST_SCRAPE_S = 20.0
"""Longest wait for the last scrape of a run; longer than the usual interval, 15 s."""
_SCRAPED_WITHIN_S = 90.0
"""Age at which the last scrape no longer counts: the longest usual interval is a minute."""
_POLL_S = 0.05
_PHASE = re.compile(r"time/(\w+)_s")
_INVALID = re.compile(r"[^a-zA-Z0-9_]")
_COUNTS = {
    "train_steps": "Optimizer steps that this process saw, repeated ones too",
    "train_nonfinite_steps": "Steps whose loss was not finite",
    "train_skipped_steps": "Steps that changed no weights",
    "train_repeated_steps": "Steps that were discarded, to be trained again from a checkpoint",
}


class PrometheusRun(TrackedRun):
    """Serves the newest values until ``finish``.

    Args:
        run_dir: of the run.
        run: the resolved configuration, with this tracker.
        plan: the plan.

    Raises:
        TrackerFailed: the address cannot be listened on.
    """

    keeps_lines = True  # counters begin at 0 in each process: no line is counted twice

    def __init__(self, run_dir: RunDir, run: Run, plan: Plan) -> None:
        assert isinstance(run.tracker, PrometheusTracker), "the sidecar opens the run of its own tracker"
        self._state = _RunCollector(run_name=run.run.name, run_id=plan.run_id)
        if plan.work.num_steps:
            self._state.gauges[NUM_STEPS] = float(plan.work.num_steps)
        registry = CollectorRegistry()
        registry.register(self._state)
        try:
            self._server = _MetricsServer(run.tracker.host, run.tracker.port, registry)
        except OSError as error:
            raise TrackerFailed(f"{plan.tracker.place}: {error.strerror or error}") from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), daemon=True)
        self._thread.start()
        print(f"Prometheus: {plan.tracker.place}", flush=True)

    def log(self, line: Mapping[str, Any]) -> None:
        """Keep the values of a line, and count it."""
        self._state.add(line)

    def rewind(self, step: int) -> None:
        """Count the steps after ``step`` as repeated."""
        self._state.rewind(step)

    def finish(self, exit_code: int) -> None:
        """Report the exit code until the next scrape, if the run is scraped, then stop."""
        self._state.finish(exit_code, within_s=LAST_SCRAPE_S)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _MetricsServer(socketserver.ThreadingTCPServer):
    """Answers each scrape on a thread, in the text format alone.

    prometheus_client's own server also speaks OpenMetrics, whose names have no colon: Prometheus, which prefers that,
    would see other names than those of a server.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self.registry = registry
        super().__init__((host, port), _Scrape)


class _Scrape(BaseHTTPRequestHandler):
    """One request."""

    timeout = 10.0
    server: _MetricsServer

    def do_GET(self) -> None:
        """Answer with all metrics."""
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        page: bytes = generate_latest(self.server.registry)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *values: object) -> None:
        """Print nothing: what this process prints is shown with the run's output."""


class _RunCollector(Collector):
    """State of a run at the time of a scrape; scrapes come in other threads."""

    def __init__(self, *, run_name: str, run_id: str) -> None:
        self._labels = {"run_name": run_name, "run_id": run_id}
        self.gauges: dict[str, float] = {}
        """Newest value by name in metrics.jsonl."""
        self._counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
        self._phases: dict[str, float] = defaultdict(float)
        self._exit_code: int | None = None
        self._scrapes: deque[float] = deque(maxlen=1)
        self._changed = threading.Condition()

    def add(self, line: Mapping[str, Any]) -> None:
        """Take one line of metrics.jsonl; null becomes NaN."""
        with self._changed:
            for name, value in line.items():
                if name == "time":
                    continue
                if phase := _PHASE.fullmatch(name):
                    self._phases[phase[1]] += value or 0.0
                else:
                    self.gauges[name] = float("nan") if value is None else float(value)
            if "train/loss" in line:
                self._counts["train_steps"] += 1
                self._counts["train_nonfinite_steps"] += line["train/loss"] is None
                self._counts["train_skipped_steps"] += bool(line.get("train/skipped"))
                self.gauges["train/last_step_timestamp_seconds"] = float(line["time"])

    def rewind(self, step: int) -> None:
        """Return to ``step``; in a new process nothing was counted that has to be repeated."""
        with self._changed:
            self._counts["train_repeated_steps"] += max(0, int(self.gauges.get("train/step", step)) - step)
            self.gauges["train/step"] = float(step)

    def finish(self, exit_code: int, *, within_s: float) -> None:
        """Report the exit code, and return once it was scraped or if no client scrapes."""
        with self._changed:
            self._exit_code = exit_code
            is_scraped = bool(self._scrapes) and time.monotonic() - self._scrapes[0] < _SCRAPED_WITHIN_S
            self._scrapes.clear()
            if is_scraped:
                self._changed.wait_for(lambda: bool(self._scrapes), timeout=within_s)

    def describe(self) -> Iterator[Metric]:
        """Yield nothing: the names are known at the first scrape, and registering is none."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Yield every number."""
        with self._changed:
            found = list(self._families())
            self._scrapes.append(time.monotonic())
            self._changed.notify_all()
        yield from found

    def _families(self) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        gauges = {_INVALID.sub("_", name): (name, value) for name, value in self.gauges.items()}
        for name, (written, value) in gauges.items():
            yield _with(GaugeMetricFamily(f"{_PREFIX}{name}", f"Newest {written}", labels=names), values, value)
        for name, what in _COUNTS.items():
            yield _with(CounterMetricFamily(f"{_PREFIX}{name}", what, labels=names), values, self._counts[name])
        what = "Time that rank 0 spent in a phase: data, forward, backward, optimizer, checkpoint, evaluate"
        phases = CounterMetricFamily(f"{_PREFIX}train_phase_seconds", what, labels=[*names, "phase"])
        for phase, seconds in self._phases.items():
            phases.add_metric([*values, phase], seconds)
        yield phases
        if self._exit_code is not None:
            family = GaugeMetricFamily(f"{_PREFIX}run_exit_code", "Exit code of the run, once it is over", labels=names)
            yield _with(family, values, self._exit_code)


def _with(family: GaugeMetricFamily | CounterMetricFamily, labels: list[str], value: float) -> Metric:
    family.add_metric(labels, value)
    return family
