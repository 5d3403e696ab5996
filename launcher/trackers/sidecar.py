"""``python -m launcher.trackers.sidecar RUN_DIR KIND``: send metrics.jsonl to one tracker.

A separate process for each tracker, started by the agent of rank 0's host: whatever a tracker does, training and the
other trackers neither wait nor fail, and whichever rank dies, the metrics it wrote are sent. It costs nothing until
the first metrics arrive, then runs at low priority. Stdin brings
``{"exit_code": N}`` when the run ends; signals meant for the run are ignored.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.config.run import Run
from launcher.config.snapshot import load_run
from launcher.plugins.loading import executor
from launcher.protocol.plan import Plan, plan_from_json
from launcher.protocol.results import parse_metrics_line, read_metrics
from launcher.protocol.rundir import RunDir
from launcher.trackers.base import MinimalRun, NotSent, TrackedRun, TrackerFailed
from launcher.utils.files import read_json, write_json

TRACKERS = {
    "wandb": "launcher.trackers.wandb_run:open_wandb",
    "mlflow": "launcher.trackers.mlflow_run:MlflowRun",
    "tensorboard": "launcher.trackers.tensorboard_run:TensorBoardRun",
    "prometheus": "launcher.trackers.prometheus_run:PrometheusRun",
}
"""Executor of each tracker of the launcher."""

_FAILED = 1


class RunEndListener(threading.Thread):
    """Waits on stdin for ``{"exit_code": N}``; its end without one means the starter is gone.

    Either way this process ends within a time limit from then on, even when its main thread hangs in a library.

    Args:
        finish_s: seconds to finish in after the line.
        orphan_s: seconds to finish in after an end without a line.
        name: of the tracker, for the line that it prints.
    """

    def __init__(self, *, finish_s: float, orphan_s: float, name: str = "the tracker") -> None:
        super().__init__(daemon=True, name="orders")
        self._limits, self._tracker = (finish_s, orphan_s), name
        self._over = threading.Event()
        self.exit_code = _FAILED
        """Exit code of the run; valid once ``wait`` reported its end."""

    def run(self) -> None:
        """Read stdin, tell the main thread, and end the process if that takes too long."""
        finish_s, orphan_s = self._limits
        code = _exit_code(sys.stdin.readline())
        self.exit_code = _FAILED if code is None else code
        self._over.set()
        threading.Event().wait(orphan_s if code is None else finish_s)
        print(f"{self._tracker} did not finish in time; metrics.jsonl has everything", flush=True)
        os._exit(_FAILED)

    def wait(self, seconds: float) -> bool:
        """Return whether the run is over, waiting for that at most ``seconds``."""
        return self._over.wait(seconds)


def _exit_code(line: str) -> int | None:
    try:
        return int(json.loads(line)["exit_code"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


class MetricsTail:
    """Reads what was appended since the last read.

    The file may not exist yet, may end in half a line, and may be replaced: a resumed run cuts off what it will do
    again. Lines come in the order of their strictly rising times, which tell those already read in a new file.

    Args:
        path: a ``metrics.jsonl``.
        after: leave out lines up to this time.
    """

    def __init__(self, path: Path, *, after: float = 0.0) -> None:
        self._path, self._offset, self._inode = path, 0, -1
        self.last_time = after
        """Time of the last line read."""
        self.kept_step: int | None = None
        """Last step that the last ``read`` left out, where the file is another than before.
        Later steps that were read from the file before are repeated."""

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines that are new."""
        self.kept_step = None
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        is_first, whole = self._offset == 0, data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = [line for line in map(parse_metrics_line, whole.splitlines()) if line and "time" in line]
        lines = [line for line in found if line["time"] > self.last_time]
        if is_first and whole and self.last_time:
            kept = (line.get("train/step", 0) for line in found if line["time"] <= self.last_time)
            self.kept_step = max(kept, default=0)
        if lines:
            self.last_time = lines[-1]["time"]
        return lines


FINISH_S = 30.0
"""Longest wait for an upload once the run is over."""
ORPHAN_S = 5.0
"""The same when the launcher is gone: then everything of the run goes."""
_POLL_S = 0.5
_RETRY_S = (5.0, 60.0)
"""Shortest and longest wait before what could not be sent is tried again."""
_NICENESS = 10
_MAX_SCRATCH_LENGTH = 56
"""Characters: W&B's socket in it has about 45 more, and the name of a socket at most 107."""
_TITLES = {"wandb": "W&B", "mlflow": "MLflow", "tensorboard": "TensorBoard", "prometheus": "Prometheus"}


def main(folder: Path, kind: str) -> None:
    """Follow the run in ``folder`` to its end, for its tracker of this kind."""
    os.nice(_NICENESS)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    title = _TITLES.get(kind, kind)
    orders = RunEndListener(finish_s=FINISH_S, orphan_s=ORPHAN_S, name=title)
    orders.start()
    run_dir = RunDir(folder)
    run, plan = load_run(run_dir.snapshot, is_own_run=True), plan_from_json(read_json(run_dir.plan))
    run, plan = of_tracker(run, plan, kind)
    started = min(run_dir.plan.stat().st_mtime, time.time())  # the plan is rewritten at each start or resume
    wait_for_metrics(run_dir, orders, since=started)
    os.environ.update(WANDB_DIR=str(folder), WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    use_scratch_folder(os.environ)
    try:
        follow(run_dir, run, plan, orders)
    except TrackerFailed as error:
        print(f"{title} gave up ({error}): metrics.jsonl continues", flush=True)
        os._exit(1)  # exit hooks of its library would fail the same way, at length


def of_tracker(run: Run, plan: Plan, kind: str) -> tuple[Run, Plan]:
    """Return run and plan as if this tracker were the only one."""
    (tracker,) = (each for each in run.tracker.members if each.kind == kind)
    (planned,) = (each for each in plan.tracker.processes if each.kind == kind)
    return replace(run, tracker=tracker), replace(plan, tracker=planned)


def use_scratch_folder(environ: MutableMapping[str, str]) -> None:
    """Have W&B use the agent's folder for temporary files.

    It is removed even after SIGKILL of everything.
    """
    scratch = environ.get("LAUNCHER_AGENT_SCRATCH")
    if scratch is not None and len(scratch) <= _MAX_SCRATCH_LENGTH:
        environ["TMPDIR"] = tempfile.tempdir = scratch


def wait_for_metrics(run_dir: RunDir, orders: RunEndListener, *, since: float) -> None:
    """Return at the first line written after ``since``, or when the run is over without one.

    A resumed run takes back the lines it will write again just before that: until then they may not be sent.
    """
    tail = MetricsTail(run_dir.metrics, after=since)
    while not tail.read() and not orders.wait(_POLL_S):
        pass


def follow(run_dir: RunDir, run: Run, plan: Plan, orders: RunEndListener) -> None:
    """Send lines as they come, then how the run ended.

    Raises:
        TrackerFailed: the tracker cannot continue.
    """
    sender = Sender(run_dir, open_run(run_dir, run, plan), plan)
    over = False
    while not over:
        over = orders.wait(_POLL_S)  # first: what was written before the end is read after it
        sender.send(is_last=over)
    sender.tracked.finish(orders.exit_code)


class Sender:
    """Passes new lines on, and remembers what a tracker has, for the next life of the run.

    Args:
        run_dir: of the run.
        tracked: the run at the tracker.
        plan: the plan, with this tracker.
    """

    def __init__(self, run_dir: RunDir, tracked: TrackedRun, plan: Plan) -> None:
        self.tracked, self._run_dir, self._tracker = tracked, run_dir, plan.tracker
        self._sent = run_dir.tracker(plan.tracker.kind) / "sent.json"
        sent = _read_sent(self._sent, plan.tracker.run_id) if tracked.keeps_lines else {}
        self._metrics = MetricsTail(run_dir.metrics, after=sent.get("time", 0.0))
        self._samples = MetricsTail(run_dir.samples, after=sent.get("samples_time", 0.0))
        self._is_unsent = False
        self._retry_at, self._wait_s, self._has_reported = 0.0, _RETRY_S[0], False

    def send(self, *, is_last: bool) -> None:
        """Read new lines and send them; what the tracker does not take is sent later.

        Args:
            is_last: whether there is no later call.
        """
        lines, samples = self._metrics.read(), self._samples.read()
        if self._metrics.kept_step is not None:
            self.tracked.rewind(self._metrics.kept_step)
        for line in lines:
            self.tracked.log(line)
        if samples:
            self.tracked.log_samples(samples, everything=list(read_metrics(self._run_dir.samples)))
        self._is_unsent |= bool(lines or samples)
        if not (self._is_unsent or is_last) or (time.monotonic() < self._retry_at and not is_last):
            return
        try:
            self.tracked.flush()
        except NotSent as error:
            self._report(error, is_last=is_last)
            return
        if self._has_reported:
            print(f"{_TITLES.get(self._tracker.kind, self._tracker.kind)}: sends again", flush=True)
        self._is_unsent, self._has_reported, self._retry_at, self._wait_s = False, False, 0.0, _RETRY_S[0]
        if self.tracked.keeps_lines:
            self._sent.parent.mkdir(exist_ok=True)
            times = {"time": self._metrics.last_time, "samples_time": self._samples.last_time}
            write_json(self._sent, {"run_id": self._tracker.run_id, **times})

    def _report(self, error: NotSent, *, is_last: bool) -> None:
        """Print why nothing is sent, once, and when it is for good."""
        if is_last:
            raise TrackerFailed(str(error)) from error
        if not self._has_reported:
            name = _TITLES.get(self._tracker.kind, self._tracker.kind)
            print(f"{name}: not reachable ({error}); tried again until the run ends", flush=True)
        self._has_reported = True
        self._retry_at = time.monotonic() + self._wait_s
        self._wait_s = min(2 * self._wait_s, _RETRY_S[1])


def open_run(run_dir: RunDir, run: Run, plan: Plan) -> TrackedRun:
    """Return the run at its tracker, which may be a plugin's."""
    opened = executor("tracker", run.tracker.kind, TRACKERS)(run_dir, run, plan)
    return opened if isinstance(opened, TrackedRun) else MinimalRun(opened)


def _read_sent(sent: Path, run_id: str) -> dict[str, float]:
    """Return the times of the last lines that an earlier life of this run sent."""
    try:
        record = json.loads(sent.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    if record["run_id"] != run_id:
        return {}
    return {name: float(record[name]) for name in ("time", "samples_time") if name in record}


if __name__ == "__main__":
    kind = sys.argv.pop()
    main(Path(sys.argv.pop()), kind)  # W&B records what is left of the arguments
