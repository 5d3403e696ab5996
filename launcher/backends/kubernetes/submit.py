"""Submit a run to the cluster, follow it until it ends, delete it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from launcher.backends.kubernetes.cluster_run import ClusterRun
from launcher.backends.kubernetes.kubectl import Kubectl
from launcher.backends.kubernetes.manifests import (
    WORKLOADS,
    Submission,
    job_reference,
    render_manifests,
    submission_of,
)
from launcher.backends.kubernetes.pod_config import KEY_FILE
from launcher.backends.kubernetes.pod_logs import follow
from launcher.config.backend.kubernetes import KubernetesBackend
from launcher.errors import EnvironmentProblem
from launcher.execution.executor import Executor
from launcher.protocol.outcome import RunOutcome
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
        if not backend.wait:
            return RunOutcome(status="submitted", exit_code=0)
        with collect_signals() as arrived:
            outcome = follow(cluster_run(submission, kubectl), arrived=arrived, say=_say)
            if outcome is not None:
                return outcome
            delete_run(submission, kubectl)  # its ranks get time to save
            return RunOutcome(status="cancelled", exit_code=128 + arrived[0])


def cluster_run(submission: Submission, kubectl: Kubectl) -> ClusterRun:
    """Return the run as other processes see it."""
    return ClusterRun(kubectl=kubectl, kind=WORKLOADS[submission.backend.workload], job=submission.job)


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


def _say(text: str) -> None:
    print(text, flush=True)
