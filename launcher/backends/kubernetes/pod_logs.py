"""What the pods of a run print, read once or followed until the run ends."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import subprocess
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.backends.kubernetes.cluster_run import ClusterRun, host_of, is_pending, status_of, waiting_reason
from launcher.backends.kubernetes.kubectl import kubectl_missing
from launcher.config.backend.kubernetes import QUEUE_LABEL
from launcher.errors import EnvironmentProblem
from launcher.protocol.outcome import RunOutcome
from launcher.utils.logs import LineSplitter
from launcher.utils.text import printable

_LOOK_EVERY_S = 2.0
_TICK_S = 0.1
_PATIENCE_S = 300.0
"""Following fails when the cluster has not answered for this time."""
_CHUNK = 1 << 16
_RANK_LINE = re.compile(r"(?P<host>[^\s:|]+):(?P<rank>\d+) \| (?P<text>.*)", re.DOTALL)
_TAIL_LINES = 1000
"""Lines at the end of the first pod's output in which those of ranks are searched."""


@dataclass(frozen=True, kw_only=True)
class LogFilter:
    """Which lines of the first pod are wanted: it prints those of all ranks and its own."""

    rank: int | None = None
    host: str | None = None

    def wants(self, line: str) -> bool:
        """Return whether a line is of the wanted ranks; without a choice, every line is."""
        if self.rank is None and self.host is None:
            return True
        found = _RANK_LINE.fullmatch(line)
        return found is not None and self.rank in (None, int(found["rank"])) and self.host in (None, found["host"])


def read_logs(run: ClusterRun, wanted: LogFilter, *, last: int | None = None) -> Iterator[str]:
    """Yield what the first pods have printed, the oldest pod first.

    Args:
        run: whose pods.
        wanted: which lines.
        last: only this many last lines of each rank, and of the session.

    Raises:
        EnvironmentProblem: the cluster does not answer, or has no pods of the run.
    """
    for pod in _existing(run, all_pods=False):
        yield from _last_of_each([line for line in _lines_of(run, pod) if wanted.wants(line)], last)


def read_agent_logs(run: ClusterRun, *, host: str | None = None, last: int | None = None) -> Iterator[str]:
    """Yield what the session and the agents have printed, each line with its host.

    Raises:
        EnvironmentProblem: the cluster does not answer, or has no pods of the run.
    """
    for pod in _existing(run, all_pods=True):
        name = host_of(pod) or pod["metadata"]["name"]
        if host in (None, name):
            lines = [f"{name}:agent | {line}" for line in _lines_of(run, pod) if not _RANK_LINE.fullmatch(line)]
            yield from lines if last is None else lines[len(lines) - min(last, len(lines)) :]


def last_lines(run: ClusterRun, pod: Any) -> dict[tuple[str, int], str]:
    """Return the last line of each rank, by host and rank, that the first pod has printed."""
    lines = _lines_of(run, pod, f"--tail={_TAIL_LINES}")
    found = filter(None, map(_RANK_LINE.fullmatch, lines))
    return {(each["host"], int(each["rank"])): each["text"] for each in found if each["text"].strip()}


def _existing(run: ClusterRun, *, all_pods: bool) -> list[Any]:
    pods = run.pods(all_pods=all_pods)
    if not pods:
        status = status_of(run.workload(), run.kind)
        why = {
            "deleted": "it was deleted, or the cluster removed it after backend.ttl_s",
            "suspended": "its queue has not admitted it yet",
        }.get(status, "the cluster has not created any yet, or they are deleted")
        raise EnvironmentProblem(f"{run.job} has no pods in the namespace {run.kubectl.namespace}: {why}")
    return pods


def _lines_of(run: ClusterRun, pod: Any, *options: str) -> list[str]:
    name = pod["metadata"]["name"]
    if is_pending(pod):
        return [f"{name}: {waiting_reason(pod)}"]
    splitter = LineSplitter()
    text = run.kubectl.run("logs", *options, f"pod/{name}")
    return [*splitter.feed(text.encode()), *splitter.rest()]


def _last_of_each(lines: Sequence[str], last: int | None) -> Iterator[str]:
    """Yield the last lines of each rank and of the session, in their order."""
    if last is None:
        yield from lines
        return
    kept: defaultdict[object, deque[int]] = defaultdict(lambda: deque(maxlen=last))
    for number, line in enumerate(lines):
        found = _RANK_LINE.fullmatch(line)
        kept[found and (found["host"], found["rank"])].append(number)
    yield from (lines[number] for number in sorted(number for numbers in kept.values() for number in numbers))


def follow(
    run: ClusterRun,
    *,
    arrived: Sequence[int],
    wanted: LogFilter | None = None,
    last: int | None = None,
    say: Callable[[str], object] = print,
) -> RunOutcome | None:
    """Print the output of the first pod, and of each that replaces it, until the run ends.

    Args:
        run: which one.
        arrived: signals; following stops once there is one.
        wanted: which lines.
        last: begin with this many last lines of each rank that are there already.
        say: prints what the run waits for, and why the cluster does not answer.

    Returns:
        How the run ended; ``None`` after a signal.

    Raises:
        EnvironmentProblem: kubectl is missing, or the cluster has not answered for minutes.
    """
    return _Follower(run, arrived=arrived, wanted=wanted or LogFilter(), last=last, say=say).run()


class _Follower:
    def __init__(
        self,
        run: ClusterRun,
        *,
        arrived: Sequence[int],
        wanted: LogFilter,
        last: int | None,
        say: Callable[[str], object],
    ) -> None:
        self._print_note = say
        self._run, self._arrived, self._wanted, self._last = run, arrived, wanted, last
        self._shown: set[str] = set()
        self._said = ""
        self._answered_at = time.monotonic()

    def run(self) -> RunOutcome | None:
        while not self._arrived:
            try:
                outcome = self._look()
                self._answered_at = time.monotonic()
            except EnvironmentProblem as problem:  # the run continues without this process: retry
                if time.monotonic() - self._answered_at > _PATIENCE_S:
                    raise
                self._say(str(problem))
            else:
                if outcome is not None and not self._arrived:
                    return outcome
            self._wait(_LOOK_EVERY_S)
        return None

    def _look(self) -> RunOutcome | None:
        """Print new output; return the outcome of the run once it has ended."""
        pods = self._run.pods(all_pods=False)
        for pod in pods:
            self._show(pod)
        self._last = None  # a pod that is created from now on is shown from its first line
        workload = self._run.workload()
        if status_of(workload, self._run.kind) == "suspended" and not pods:
            queue = (workload or {}).get("metadata", {}).get("labels", {}).get(QUEUE_LABEL, "")
            self._say(f"{self._run.job} is suspended{f': it waits in the queue {queue}' if queue else ''}")
        return self._run.outcome(workload)

    def _show(self, pod: Any) -> None:
        """Print a pod's output until it exits; while it is pending, print the reason once."""
        name = pod["metadata"]["name"]
        if name in self._shown:
            return
        if is_pending(pod):
            self._say(f"{name}: {waiting_reason(pod)}")
            return
        self._shown.add(name)
        num_skipped = 0
        if self._last is not None:
            before = _lines_of(self._run, pod)
            num_skipped = len(before)
            self._print(_last_of_each([line for line in before if self._wanted.wants(line)], self._last))
        for line in self._stream(name):
            num_skipped -= 1
            if num_skipped < 0 and self._wanted.wants(line):
                self._print([line])

    def _stream(self, pod: str) -> Iterator[str]:
        """Yield the lines of a pod until its container ends, or a signal arrives."""
        argv = self._run.kubectl.argv("logs", "--follow", f"pod/{pod}")
        try:
            logs = subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)
        except FileNotFoundError as error:
            raise kubectl_missing() from error
        assert logs.stdout is not None, "a pipe was asked for"
        splitter = LineSplitter()
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(logs.stdout, selectors.EVENT_READ)
                while not self._arrived:
                    if selector.select(_TICK_S):
                        data = os.read(logs.stdout.fileno(), _CHUNK)
                        if not data:
                            break
                        yield from splitter.feed(data)
            yield from splitter.rest()
        finally:
            with contextlib.suppress(ProcessLookupError):
                logs.kill()
            logs.stdout.close()
            logs.wait()

    def _print(self, lines: Iterable[str]) -> None:
        for line in lines:
            print(printable(line), flush=True)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._print_note(printable(text))

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._arrived:
            time.sleep(_TICK_S)
