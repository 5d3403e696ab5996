"""Staying with a run in the cluster: its output here as it appears, and in the end its exit code."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.backends.kubernetes.kubectl import Kubectl, missing
from launcher.backends.kubernetes.pods import Submission
from launcher.backends.kubernetes.submit import take_out
from launcher.backends.kubernetes.workloads import WORKLOADS
from launcher.errors import EXIT_PREEMPTED, EnvironmentProblem
from launcher.supervise.failure import Failure
from launcher.supervise.outcome import Outcome
from launcher.supervise.signals import collected_signals

_LOOK_EVERY_S = 2.0
_TICK_S = 0.1
_PATIENCE_S = 300.0
"""Time that the cluster may leave us without an answer."""
_LOST = 255
"""Exit code of a run whose first pod left none."""


def follow(submission: Submission, kubectl: Kubectl) -> Outcome:
    """Show the output of the first pod, of each that takes its place too, until the run ends.

    A signal deletes the run: its ranks get their time to save.

    Raises:
        EnvironmentProblem: kubectl is missing, or the cluster has not answered for minutes.
    """
    with collected_signals() as arrived:
        return _Follower(submission, kubectl, arrived=arrived).run()


class _Follower:
    def __init__(self, submission: Submission, kubectl: Kubectl, *, arrived: Sequence[int]) -> None:
        self._submission, self._kubectl, self._arrived = submission, kubectl, arrived
        self._kind = WORKLOADS[submission.backend.workload]
        self._shown: set[str] = set()
        self._said = ""
        self._answered_at = time.monotonic()

    def run(self) -> Outcome:
        while not self._arrived:
            try:
                outcome = self._look()
                self._answered_at = time.monotonic()
            except EnvironmentProblem as problem:  # the run goes on without us: no reason to give up at once
                if time.monotonic() - self._answered_at > _PATIENCE_S:
                    raise
                self._say(str(problem))
            else:
                if outcome is not None and not self._arrived:
                    return outcome
            self._wait(_LOOK_EVERY_S)
        take_out(self._submission, self._kubectl)
        return Outcome(status="cancelled", exit_code=128 + self._arrived[0])

    def _look(self) -> Outcome | None:
        """Show what is new; return the end of the run once there is one."""
        for pod in self._pods(all_pods=False):
            self._show(pod)
        succeeded = self._ended()
        return None if succeeded is None else self._outcome(succeeded=succeeded)

    def _pods(self, *, all_pods: bool) -> list[Any]:
        """Return every first pod there has been, the oldest first; or every pod of the run."""
        labels = f"app.kubernetes.io/instance={self._submission.job}"
        labels += "" if all_pods else f",{self._kind.first_pod}"
        found: list[Any] = self._kubectl.get("pods", f"--selector={labels}")["items"]
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def _show(self, pod: Any) -> None:
        """Print a pod's output until it ends; while it has not begun, say once what it waits for."""
        name = pod["metadata"]["name"]
        if name in self._shown:
            return
        if pod["status"].get("phase", "Pending") == "Pending":
            self._say(f"{name}: {_waits_for(pod)}")
            return
        self._shown.add(name)
        try:
            logs = subprocess.Popen(self._kubectl.argv("logs", "--follow", f"pod/{name}"), start_new_session=True)
        except FileNotFoundError as error:
            raise missing() from error
        try:
            while logs.poll() is None and not self._arrived:
                time.sleep(_TICK_S)
        finally:
            logs.kill()
            logs.wait()

    def _ended(self) -> bool | None:
        """Return whether the run went well; ``None`` while it has not ended."""
        run = self._kubectl.get(f"{self._kind.resource}/{self._submission.job}")
        true = {told["type"] for told in run.get("status", {}).get("conditions", ()) if told["status"] == "True"}
        succeeded, failed = (condition in true for condition in self._kind.conditions)
        return succeeded if succeeded or failed else None

    def _outcome(self, *, succeeded: bool) -> Outcome:
        """Return the end of the run: what its first pod said, or else the end of the pod that took it along."""
        if succeeded:
            return Outcome(status="completed", exit_code=0)
        first = self._ends(all_pods=False)
        causes = [end for end in (*self._ends(all_pods=True), *first) if end.code not in (0, EXIT_PREEMPTED)]
        if causes:
            return self._failed(causes[-1])
        if first:
            return Outcome(status="preempted", exit_code=EXIT_PREEMPTED)
        job = self._submission.job
        return self._failed(_End(pod=job, code=_LOST, said=f"{job} failed, and no pod is left to say why"))

    def _ends(self, *, all_pods: bool) -> list[_End]:
        return [end for pod in self._pods(all_pods=all_pods) if (end := _end_of(pod))]

    def _failed(self, end: _End) -> Outcome:
        job, namespace = self._submission.job, self._submission.backend.namespace
        failure = Failure(
            host=end.pod,
            rank=None,
            exit_code=end.code,
            signal=None,
            reason=end.said,
            log=f"`kubectl describe {self._kind.resource} {job} --namespace={namespace}`",
            time=time.time(),
        )
        return Outcome(status="failed", exit_code=end.code, failure=failure)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(text, flush=True)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._arrived:
            time.sleep(_TICK_S)


def _waits_for(pod: Any) -> str:
    """Return why a pod has not begun: the cluster has no room, or an image cannot be had."""
    for told in pod["status"].get("containerStatuses", ()):
        if waiting := told["state"].get("waiting"):
            return ": ".join(filter(None, (waiting.get("reason"), waiting.get("message"))))
    for told in pod["status"].get("conditions", ()):
        if told["status"] == "False" and told.get("message"):
            return f"{told.get('reason', told['type'])}: {told['message']}"
    return "waits to be placed"


@dataclass(frozen=True, kw_only=True)
class _End:
    """How the container of a pod ended."""

    pod: str
    code: int
    said: str
    """The cause that its last line names; where it had no time to write one, what the cluster knows."""


def _end_of(pod: Any) -> _End | None:
    for told in pod["status"].get("containerStatuses", ()):
        if ended := told["state"].get("terminated"):
            name, code = str(pod["metadata"]["name"]), int(ended["exitCode"])
            last = str(ended.get("message", "")).strip().rpartition("\n")[2]
            beginning = f"exit code {code}: "
            known = f"the pod {name} ended with exit code {code} ({ended.get('reason', 'Error')})"
            said = last.removeprefix(beginning) if last.startswith(beginning) else known
            return _End(pod=name, code=code, said=said)
    return None
