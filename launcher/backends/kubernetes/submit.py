"""Putting a run into the cluster, and taking it out again."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path

from launcher.backends.kubernetes.kubectl import Kubectl
from launcher.backends.kubernetes.manifests import render_manifests
from launcher.backends.kubernetes.orders import KEY
from launcher.backends.kubernetes.pods import Submission
from launcher.backends.kubernetes.workloads import WORKLOADS, job_reference
from launcher.errors import EnvironmentProblem
from launcher.rundir import RunDir
from launcher.supervise.whereabouts import Whereabouts, place_of_this_process, write_whereabouts

_KEY_BYTES = 32


def put(submission: Submission, kubectl: Kubectl, *, snapshot: str, environ: Mapping[str, str] = os.environ) -> None:
    """Create the Secret and apply the manifests.

    Raises:
        EnvironmentProblem: kubectl is missing or the cluster refuses; nothing of the run is left there.
    """
    manifests = render_manifests(submission, snapshot=snapshot)
    kubectl.run("create", "--filename=-", document=_secret(submission, environ))
    is_there = False
    try:
        kubectl.run("apply", "--filename=-", document=manifests)
        _tie(submission, kubectl)
        _record(submission)
        is_there = True
    finally:
        if not is_there:
            with contextlib.suppress(EnvironmentProblem):  # what went wrong first is what counts
                take_out(submission, kubectl)


def take_out(submission: Submission, kubectl: Kubectl) -> None:
    """Delete everything of the run; its pods get their time to save.

    Raises:
        EnvironmentProblem: the cluster refuses; what else can be deleted is.
    """
    kind = WORKLOADS[submission.backend.workload]
    problems = []
    for resource in (kind.resource, *kind.others, "secrets", "configmaps"):
        try:
            kubectl.run("delete", f"{resource}/{submission.job}", "--ignore-not-found", "--wait=false")
        except EnvironmentProblem as problem:  # the resource itself may be unknown there
            problems.append(problem)
    if problems:
        raise problems[0]


def _secret(submission: Submission, environ: Mapping[str, str]) -> str:
    """Return the document that holds what nobody may read: it goes to kubectl's stdin and nowhere else."""
    forwarded = {name: environ[name] for name in submission.plan.forward if name in environ}
    values = {KEY: secrets.token_hex(_KEY_BYTES), **forwarded}
    document = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": submission.metadata(),
        "immutable": True,
        "data": {name: base64.b64encode(os.fsencode(value)).decode() for name, value in values.items()},
    }
    return json.dumps(document)


def _tie(submission: Submission, kubectl: Kubectl) -> None:
    """Make the run the owner of what was made for it: when it goes, by whoever's hand, that goes too."""
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
    """Write down here who runs the run, for ``status`` and ``cancel``."""
    job = job_reference(submission.backend, submission.job)
    whereabouts = Whereabouts(backend=submission.plan.backend, session=place_of_this_process(), job=job)
    write_whereabouts(RunDir(Path(submission.plan.run_dir)), whereabouts)


def next_steps(submission: Submission, kubectl: Kubectl) -> list[str]:
    """Return what to tell the user: where it is, and what to type next."""
    kind = WORKLOADS[submission.backend.workload]
    first = f"--selector=app.kubernetes.io/instance={submission.job},{kind.first_pod}"
    commands = {
        "watch": kubectl.argv("get", "pods", "--watch", f"--selector=app.kubernetes.io/instance={submission.job}"),
        "output": kubectl.argv("logs", "--follow", "--tail=-1", first),
        "cancel": kubectl.argv("delete", kind.resource, submission.job),
    }
    return [
        f"submitted {kind.resource}/{submission.job} to the namespace {submission.backend.namespace}",
        *(f"  {what:8}{shlex.join(argv)}" for what, argv in commands.items()),
    ]
