"""``python -m launcher.trackers.sidecar RUN_DIR``: send metrics.jsonl to W&B.

A separate process, started by the agent of rank 0's host: whatever W&B does, training neither waits nor fails, and
whichever rank dies, the metrics it wrote are sent. It costs nothing until the first metrics arrive, then runs at low
priority. Stdin brings ``{"exit_code": N}`` when the run ends; signals meant for the run are ignored.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, Protocol

from launcher.config.run import Run
from launcher.config.snapshot import load_run
from launcher.config.tracker import Wandb
from launcher.plugins.loading import executor
from launcher.protocol.plan import Plan, plan_from_json
from launcher.protocol.results import parse_metrics_line
from launcher.protocol.rundir import RunDir
from launcher.utils.files import home_folder, read_json, write_json

_FAILED = 1


class RunEndListener(threading.Thread):
    """Waits on stdin for ``{"exit_code": N}``; its end without one means the starter is gone.

    Either way this process ends within a time limit from then on, even when its main thread hangs in a library.

    Args:
        finish_s: seconds to finish in after the line.
        orphan_s: seconds to finish in after an end without a line.
    """

    def __init__(self, *, finish_s: float, orphan_s: float) -> None:
        super().__init__(daemon=True, name="orders")
        self._limits = (finish_s, orphan_s)
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
        print("W&B did not finish in time; metrics.jsonl has everything", flush=True)
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

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines that are new."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = [
            line
            for line in map(parse_metrics_line, whole.splitlines())
            if line and line.get("time", 0.0) > self.last_time
        ]
        if lines:
            self.last_time = lines[-1]["time"]
        return lines


FINISH_S = 30.0
"""Longest wait for an upload once the run is over."""
ORPHAN_S = 5.0
"""The same when the launcher is gone: then everything of the run goes."""
_POLL_S = 0.5
_NICENESS = 10
_MAX_SCRATCH_LENGTH = 56
"""Characters: W&B's socket in it has about 45 more, and the name of a socket at most 107."""


def main(folder: Path) -> None:
    """Follow the run in ``folder`` to its end."""
    os.nice(_NICENESS)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    orders = RunEndListener(finish_s=FINISH_S, orphan_s=ORPHAN_S)
    orders.start()
    run_dir = RunDir(folder)
    run, plan = load_run(run_dir.snapshot, is_own_run=True), plan_from_json(read_json(run_dir.plan))
    started = min(run_dir.plan.stat().st_mtime, time.time())  # the plan is rewritten at each start or resume
    wait_for_metrics(run_dir, orders, since=started)
    os.environ.update(WANDB_DIR=str(folder), WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    use_scratch_folder(os.environ)
    if run.tracker.kind != Wandb.kind:
        follow(run_dir, run, plan, orders)
        return
    import wandb

    try:
        follow(run_dir, run, plan, orders)
    except Exception as error:  # its service is gone, or the disk full
        if not (isinstance(error, wandb.Error | OSError) or type(error).__module__.startswith("wandb.")):
            raise  # not W&B's: its errors have no one class (HandleAbandonedError of a service that died meanwhile)
        print(f"W&B gave up ({_first_line(error)}): metrics.jsonl continues", flush=True)
        os._exit(1)  # its exit hooks would fail the same way, at length


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
    """Send lines as they come, then how the run ended."""
    tracked, online = open_run(run_dir, run, plan)
    sent = run_dir.tracker / "sent.json"
    tail = MetricsTail(run_dir.metrics, after=_sent_until(sent, plan.tracker.run_id) if online else 0.0)
    over = False
    while not over:
        over = orders.wait(_POLL_S)  # first: what was written before the end is read after it
        lines = tail.read()
        for line in lines:
            tracked.log(line)
        if lines and online:
            write_json(sent, {"run_id": plan.tracker.run_id, "time": tail.last_time})
    tracked.finish(orders.exit_code)


class TrackedRun(Protocol):
    """A run at a tracker; a plugin's is built from run directory, run and plan."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Send one line of metrics.jsonl."""

    def finish(self, exit_code: int) -> None:
        """Close with the run's exit code."""


def open_run(run_dir: RunDir, run: Run, plan: Plan) -> tuple[TrackedRun, bool]:
    """Return the tracked run, and whether it is online: a W&B server that answers."""
    if run.tracker.kind != Wandb.kind:
        return executor("tracker", run.tracker.kind, {})(run_dir, run, plan), False
    run_dir.tracker.mkdir(exist_ok=True)
    import wandb

    from launcher.trackers.wandb_run import WandbRun, unreachable

    trouble = None
    if plan.tracker.mode == "online":
        trouble = unreachable(os.environ, home_folder())
        try:
            if trouble is None:
                tracked = WandbRun(run_dir, run, plan, online=True)
                print(f"W&B: {tracked.place}", flush=True)
                return tracked, True
        except wandb.Error as error:
            trouble = _first_line(error)
            wandb.teardown()
    tracked = WandbRun(run_dir, run, plan, online=False)
    print(f"W&B: {f'not reachable ({trouble}); ' if trouble else ''}{tracked.place}", flush=True)
    return tracked, False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _sent_until(sent: Path, run_id: str) -> float:
    """Return the time of the last line that an earlier life of this run sent to the server."""
    try:
        record = json.loads(sent.read_bytes())
    except (FileNotFoundError, ValueError):
        return 0.0
    return float(record["time"]) if record["run_id"] == run_id else 0.0


if __name__ == "__main__":
    main(Path(sys.argv.pop()))  # W&B records what is left of the arguments
