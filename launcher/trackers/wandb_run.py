"""One W&B run: open it, log lines of metrics.jsonl, finish it. Imports wandb: sidecar only."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from launcher.config.run import Run
from launcher.config.tracker import find_wandb_credentials
from launcher.errors.secrets import redact
from launcher.protocol.plan import Plan
from launcher.protocol.results import last_metrics, read_benchmark_record
from launcher.protocol.rundir import RunDir
from launcher.trackers.base import TrackedRun, TrackerFailed
from launcher.trackers.records import config_of
from launcher.utils.files import home_folder

_FLUSH_S = 0.5
_INIT_TIMEOUT_S = 10
_CONNECT_TIMEOUT_S = 5.0


def open_wandb(run_dir: RunDir, run: Run, plan: Plan) -> WandbRun:
    """Return the run at W&B; offline where the server does not answer or refuses.

    Raises:
        TrackerFailed: it cannot be kept offline either.
    """
    run_dir.tracker("wandb").mkdir(exist_ok=True)
    trouble = None
    if plan.tracker.mode == "online":
        trouble = unreachable(os.environ, home_folder())
        try:
            if trouble is None:
                tracked = WandbRun(run_dir, run, plan, online=True)
                print(f"W&B: {tracked.place}", flush=True)
                return tracked
        except wandb.Error as error:
            trouble = str(TrackerFailed(error))
            wandb.teardown()
    with _as_failure():
        tracked = WandbRun(run_dir, run, plan, online=False)
    print(f"W&B: {f'not reachable ({trouble}); ' if trouble else ''}{tracked.place}", flush=True)
    return tracked


@contextmanager
def _as_failure() -> Iterator[None]:
    """Turn errors of W&B into ``TrackerFailed``: its service is gone, or the disk full."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, wandb.Error | OSError) or type(error).__module__.startswith("wandb.")):
            raise  # not W&B's: its errors have no one class (HandleAbandonedError of a service that died meanwhile)
        raise TrackerFailed(error) from error


class WandbRun(TrackedRun):
    """A W&B run that is open until ``finish``.

    Args:
        run_dir: of the run; W&B keeps its files in ``wandb/`` below it.
        run: the resolved configuration.
        plan: the plan, with the W&B run id.
        online: whether to talk to the server; else everything is kept for ``wandb sync``.

    Raises:
        wandb.Error: the server refused, or did not answer in time.
    """

    def __init__(self, run_dir: RunDir, run: Run, plan: Plan, *, online: bool) -> None:
        self._run_dir, self.keeps_lines = run_dir, online
        self._wandb = wandb.init(
            id=plan.tracker.run_id,
            name=plan.run_id,
            project=plan.tracker.project,
            entity=getattr(run.tracker, "entity", None),
            group=plan.tracker.group,
            tags=list(getattr(run.tracker, "tags", ())),
            job_type=plan.job,
            dir=run_dir.path,
            mode="online" if online else "offline",
            resume="allow" if online else None,
            config=config_of(run, plan),
            settings=_settings(),
        )
        self._wandb.define_metric("train/step")
        self._wandb.define_metric("*", step_metric="train/step")

    @property
    def place(self) -> str:
        """Where a person finds the run: a URL, or what to type to upload it."""
        if self.keeps_lines:
            return str(self._wandb.url)
        return f"`wandb sync {Path(self._wandb.dir).parent}` uploads this run"

    def log(self, line: Mapping[str, Any]) -> None:
        """Send one line of metrics.jsonl, under the time at which it was written; null becomes NaN."""
        values = {name: float("nan") if value is None else value for name, value in line.items() if name != "time"}
        with _as_failure():
            self._wandb.log({**values, "_timestamp": line["time"]})

    def log_samples(self, samples: Sequence[Mapping[str, Any]], *, everything: Sequence[Mapping[str, Any]]) -> None:
        """Send all generated texts so far as a table."""
        columns = ["step", "prompt", "text"]
        rows = redact([[line["train/step"], line["prompt"], line["text"]] for line in everything], os.environ)
        last = samples[-1]
        with _as_failure():
            table = wandb.Table(columns=columns, data=rows)
            self._wandb.log({"samples": table, "train/step": last["train/step"], "_timestamp": last["time"]})

    def finish(self, exit_code: int) -> None:
        """Add what the run left behind and close with its exit code; online, wait until all is sent."""
        with _as_failure():
            self._finish(exit_code)

    def _finish(self, exit_code: int) -> None:
        last = last_metrics(self._run_dir.metrics)
        finite = {name: value for name, value in last.items() if value is not None and name != "time"}
        self._wandb.summary.update({**finite, "exit_code": exit_code})
        if self._run_dir.sample.exists():
            self._wandb.summary["sample"] = self._run_dir.sample.read_text(encoding="utf-8")
        if self._run_dir.curve.exists():
            self._wandb.summary["loss_curve"] = wandb.Image(str(self._run_dir.curve))
        self._wandb.summary.update(dict(benchmark_media(self._run_dir)))
        self._wandb.finish(exit_code=exit_code)


def benchmark_media(run_dir: RunDir) -> Iterator[tuple[str, Any]]:
    """Yield W&B's view of a benchmark: tables of cases and findings, and a picture.

    One that did not get to its end has none.
    """
    results, drawn = run_dir.benchmark("json"), run_dir.benchmark("png")
    if results.is_file():
        try:
            found = read_benchmark_record(results)
        except ValueError as error:
            print(f"no table is sent to W&B: {results} {error}", flush=True)
            return
        columns = ["case", "quantity", "median", "least", "most", "values"]
        yield "benchmark/cases", wandb.Table(columns=columns, data=[list(row) for row in found.rows()])
        findings = redact([[line] for line in found.findings], os.environ)
        yield "benchmark/findings", wandb.Table(columns=["finding"], data=findings)
    if drawn.is_file():
        yield "benchmark/picture", wandb.Image(str(drawn))


def unreachable(environ: Mapping[str, str], home: Path) -> str | None:
    """Return why the W&B server cannot be reached; ``None`` if it can, or behind a proxy."""
    server = urlsplit(find_wandb_credentials(environ, home).server)
    if any(environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return None
    port = server.port or (80 if server.scheme == "http" else 443)
    try:
        socket.create_connection((server.hostname or "", port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return f"{server.netloc}: {error.strerror or error}"
    return None


def _settings() -> wandb.Settings:
    """Return settings by which W&B records only the given data, not the process."""
    return wandb.Settings(
        console="off",
        silent=True,
        program="launcher",
        disable_code=True,
        disable_git=True,
        save_code=False,
        disable_job_creation=True,
        init_timeout=_INIT_TIMEOUT_S,
        x_save_requirements=False,
        x_transaction_log_flush_interval=_FLUSH_S,
    )
