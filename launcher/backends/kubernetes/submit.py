"""Submit a run to the cluster, follow it until it ends, delete it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.backends.kubernetes.kubectl import Kubectl, kubectl_missing
from launcher.backends.kubernetes.manifests import (
    WORKLOADS,
    Submission,
    job_reference,
    render_manifests,
    submission_of,
)
from launcher.backends.kubernetes.pod_config import KEY_FILE
from launcher.config.backend.kubernetes import KubernetesBackend
from launcher.errors import EXIT_PREEMPTED, EnvironmentProblem
from launcher.execution.executor import Executor
from launcher.protocol.outcome import Failure, RunOutcome
from launcher.protocol.plan import Host, Plan
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import SessionRecord, locate_this_process, write_session_file
from launcher.remote.command import RemoteCommand
from launcher.utils.processes import collect_signals
from launcher.utils.text import shell_command

_KEY_BYTES = 32


class KubernetesExecutor(Executor[KubernetesBackend]):
    """Applies the manifests of a run, which the first pod executes."""

    def remote_command(self, host: Host, module: str) -> RemoteCommand:
        """Raise: pods exist only during the run, and their agents connect to the session themselves.

        Raises:
            EnvironmentProblem: always.
        """
        raise EnvironmentProblem(f"{host.name} is a pod: it exists only during its run, and cannot be logged in to")

    def render(self, plan: Plan, *, snapshot: str) -> str:
        """Return the manifests."""
        return render_manifests(submission_of(self.backend, plan, plugins=self.plugins), snapshot=snapshot)

    def submit(self, plan: Plan) -> RunOutcome:
        """Apply the manifests; follow the run until it ends where ``wait`` is set.

        Raises:
            EnvironmentProblem: kubectl is missing, or the cluster rejects the run.
        """
        backend = self.backend
        submission = submission_of(backend, plan, plugins=self.plugins)
        kubectl = Kubectl(namespace=backend.namespace, context=backend.context)
        snapshot = RunDir(Path(plan.run_dir)).snapshot.read_text(encoding="utf-8")
        create_run(submission, kubectl, snapshot=snapshot)
        print("\n".join(next_steps(submission, kubectl)), flush=True)
        return follow(submission, kubectl) if backend.wait else RunOutcome(status="submitted", exit_code=0)


def create_run(
    submission: Submission, kubectl: Kubectl, *, snapshot: str, environ: Mapping[str, str] = os.environ
) -> None:
    """Create the Secret and apply the manifests.

    Raises:
        EnvironmentProblem: kubectl is missing or the cluster rejects a manifest; everything created is deleted.
    """
    manifests = render_manifests(submission, snapshot=snapshot)
    kubectl.run("create", "--filename=-", document=_secret(submission, environ))
    is_there = False
    try:
        kubectl.run("apply", "--filename=-", document=manifests)
        _set_owner(submission, kubectl)
        _record(submission)
        is_there = True
    finally:
        if not is_there:
            with contextlib.suppress(EnvironmentProblem):  # the first error is the one to report
                delete_run(submission, kubectl)


def delete_run(submission: Submission, kubectl: Kubectl) -> None:
    """Delete every object of the run; its pods get time to save.

    Raises:
        EnvironmentProblem: the cluster rejects a deletion; the other objects are deleted.
    """
    kind = WORKLOADS[submission.backend.workload]
    errors = []
    for resource in (kind.resource, *kind.others, "secrets", "configmaps"):
        try:
            kubectl.run("delete", f"{resource}/{submission.job}", "--ignore-not-found", "--wait=false")
        except EnvironmentProblem as problem:  # the cluster may not have this kind of resource
            errors.append(problem)
    if errors:
        raise errors[0]


def _secret(submission: Submission, environ: Mapping[str, str]) -> str:
    """Return the Secret's document, which is passed to kubectl's stdin only."""
    forwarded = {name: environ[name] for name in submission.plan.forwarded_env if name in environ}
    values = {KEY_FILE: secrets.token_hex(_KEY_BYTES), **forwarded}
    document = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": submission.metadata(),
        "immutable": True,
        "data": {name: base64.b64encode(os.fsencode(value)).decode() for name, value in values.items()},
    }
    return json.dumps(document)


def _set_owner(submission: Submission, kubectl: Kubectl) -> None:
    """Make the workload own every other object, so that deleting it deletes all."""
    kind = WORKLOADS[submission.backend.workload]
    run = kubectl.get(f"{kind.resource}/{submission.job}")
    owner = {
        "apiVersion": run["apiVersion"],
        "kind": run["kind"],
        "name": submission.job,
        "uid": run["metadata"]["uid"],
    }
    patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
    for resource in ("configmaps", "secrets", *kind.others):
        kubectl.run("patch", f"{resource}/{submission.job}", "--type=merge", f"--patch={patch}")


def _record(submission: Submission) -> None:
    """Write session.json on this machine, for ``status`` and ``cancel``."""
    job = job_reference(submission.backend, submission.job)
    record = SessionRecord(backend=submission.plan.backend, session=locate_this_process(), job=job)
    write_session_file(RunDir(Path(submission.plan.run_dir)), record)


def next_steps(submission: Submission, kubectl: Kubectl) -> list[str]:
    """Return lines for the user: where the run is, and the next commands."""
    kind = WORKLOADS[submission.backend.workload]
    first = f"--selector=app.kubernetes.io/instance={submission.job},{kind.first_pod}"
    commands = {
        "watch": kubectl.argv("get", "pods", "--watch", f"--selector=app.kubernetes.io/instance={submission.job}"),
        "output": kubectl.argv("logs", "--follow", "--tail=-1", first),
        "cancel": kubectl.argv("delete", kind.resource, submission.job),
    }
    return [
        f"submitted {kind.resource}/{submission.job} to the namespace {submission.backend.namespace}",
        *(f"  {what:8}{shell_command(argv)}" for what, argv in commands.items()),
    ]


_LOOK_EVERY_S = 2.0
_TICK_S = 0.1
_PATIENCE_S = 300.0
"""Following fails when the cluster has not answered for this time."""
_LOST = 255
"""Exit code of a run whose first pod reported none."""


def follow(submission: Submission, kubectl: Kubectl) -> RunOutcome:
    """Print the output of the first pod, and of each that replaces it, until the run ends.

    A signal deletes the run; its ranks get time to save.

    Raises:
        EnvironmentProblem: kubectl is missing, or the cluster has not answered for minutes.
    """
    with collect_signals() as arrived:
        return _Follower(submission, kubectl, arrived=arrived).run()


class _Follower:
    def __init__(self, submission: Submission, kubectl: Kubectl, *, arrived: Sequence[int]) -> None:
        self._submission, self._kubectl, self._arrived = submission, kubectl, arrived
        self._kind = WORKLOADS[submission.backend.workload]
        self._shown: set[str] = set()
        self._said = ""
        self._answered_at = time.monotonic()

    def run(self) -> RunOutcome:
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
        delete_run(self._submission, self._kubectl)
        return RunOutcome(status="cancelled", exit_code=128 + self._arrived[0])

    def _look(self) -> RunOutcome | None:
        """Print new output; return the outcome of the run once it has ended."""
        for pod in self._pods(all_pods=False):
            self._show(pod)
        succeeded = self._ended()
        return None if succeeded is None else self._outcome(succeeded=succeeded)

    def _pods(self, *, all_pods: bool) -> list[Any]:
        """Return every first pod of the run, the oldest first; or all of its pods."""
        labels = f"app.kubernetes.io/instance={self._submission.job}"
        labels += "" if all_pods else f",{self._kind.first_pod}"
        found: list[Any] = self._kubectl.get("pods", f"--selector={labels}")["items"]
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def _show(self, pod: Any) -> None:
        """Print a pod's output until it exits; while it is pending, print the reason once."""
        name = pod["metadata"]["name"]
        if name in self._shown:
            return
        if pod["status"].get("phase", "Pending") == "Pending":
            self._say(f"{name}: {_waiting_reason(pod)}")
            return
        self._shown.add(name)
        try:
            logs = subprocess.Popen(self._kubectl.argv("logs", "--follow", f"pod/{name}"), start_new_session=True)
        except FileNotFoundError as error:
            raise kubectl_missing() from error
        try:
            while logs.poll() is None and not self._arrived:
                time.sleep(_TICK_S)
        finally:
            logs.kill()
            logs.wait()

    def _ended(self) -> bool | None:
        """Return whether the run completed; ``None`` while it has not ended."""
        run = self._kubectl.get(f"{self._kind.resource}/{self._submission.job}")
        true = {
            condition["type"]
            for condition in run.get("status", {}).get("conditions", ())
            if condition["status"] == "True"
        }
        succeeded, failed = (name in true for name in self._kind.conditions)
        return succeeded if succeeded or failed else None

    def _outcome(self, *, succeeded: bool) -> RunOutcome:
        """Return the outcome reported by the first pod, else by the pod whose exit caused the end."""
        if succeeded:
            return RunOutcome(status="completed", exit_code=0)
        first = self._ends(all_pods=False)
        causes = [end for end in (*self._ends(all_pods=True), *first) if end.code not in (0, EXIT_PREEMPTED)]
        if causes:
            return self._failed(causes[-1])
        if first:
            return RunOutcome(status="preempted", exit_code=EXIT_PREEMPTED)
        job = self._submission.job
        return self._failed(
            _ContainerEnd(pod=job, code=_LOST, said=f"{job} failed, and its pods are gone, so the reason is unknown")
        )

    def _ends(self, *, all_pods: bool) -> list[_ContainerEnd]:
        return [end for pod in self._pods(all_pods=all_pods) if (end := _container_end(pod))]

    def _failed(self, end: _ContainerEnd) -> RunOutcome:
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
        return RunOutcome(status="failed", exit_code=end.code, failure=failure)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(text, flush=True)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._arrived:
            time.sleep(_TICK_S)


def _waiting_reason(pod: Any) -> str:
    """Return why a pod is pending: no node has room, or its image cannot be pulled."""
    for container in pod["status"].get("containerStatuses", ()):
        if waiting := container["state"].get("waiting"):
            return ": ".join(filter(None, (waiting.get("reason"), waiting.get("message"))))
    for condition in pod["status"].get("conditions", ()):
        if condition["status"] == "False" and condition.get("message"):
            return f"{condition.get('reason', condition['type'])}: {condition['message']}"
    return "waits to be scheduled"


@dataclass(frozen=True, kw_only=True)
class _ContainerEnd:
    """How the container of a pod ended."""

    pod: str
    code: int
    said: str
    """The cause in its last line; without one, the cluster's own reason."""


def _container_end(pod: Any) -> _ContainerEnd | None:
    for container in pod["status"].get("containerStatuses", ()):
        if ended := container["state"].get("terminated"):
            name, code = str(pod["metadata"]["name"]), int(ended["exitCode"])
            last = str(ended.get("message", "")).strip().rpartition("\n")[2]
            beginning = f"exit code {code}: "
            known = f"the pod {name} ended with exit code {code} ({ended.get('reason', 'Error')})"
            said = last.removeprefix(beginning) if last.startswith(beginning) else known
            return _ContainerEnd(pod=name, code=code, said=said)
    return None
