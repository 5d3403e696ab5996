"""The state of a run in the cluster as plain data, for ``launch status``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.backends.kubernetes.cluster_run import (
    ClusterRun,
    host_of,
    is_pending,
    pod_end,
    status_of,
    waiting_reason,
)
from launcher.backends.kubernetes.pod_logs import last_lines
from launcher.errors import EnvironmentProblem


def read_cluster_state(job: Mapping[str, str]) -> dict[str, Any]:
    """Return what the cluster knows of a run.

    Args:
        job: its names in ``session.json``.

    Returns:
        ``status`` (running, suspended, completed, failed, deleted or unknown), ``said`` (the reason, if any), ``pods``
        (each with ``host``, ``name``, ``phase``, ``node`` and ``said``, why it waits or how it ended), and ``ranks``
        (each with ``host``, ``rank`` and ``line``, the last one that it printed).
    """
    state: dict[str, Any] = {"status": "unknown", "said": "", "pods": [], "ranks": []}
    try:
        run = ClusterRun.of_job(job)
        workload = run.workload()
        state["status"] = status_of(workload, run.kind)
        state["said"] = _reason(workload)
        pods = run.pods(all_pods=True)
        state["pods"] = [_pod(pod) for pod in pods]
        first = [pod for pod in pods if host_of(pod) == "node0" and not is_pending(pod)]
        if first:
            lines = last_lines(run, first[-1])
            state["ranks"] = [
                {"host": host, "rank": rank, "line": line}
                for (host, rank), line in sorted(lines.items(), key=lambda each: each[0][1])
            ]
    except EnvironmentProblem as problem:
        state["said"] = str(problem)
    return state


def _reason(workload: Any | None) -> str:
    """Return the message of the workload's newest condition that has one."""
    conditions = (workload or {}).get("status", {}).get("conditions", ())
    said = [str(each["message"]) for each in conditions if each["status"] == "True" and each.get("message")]
    return said[-1] if said else ""


def _pod(pod: Any) -> dict[str, str]:
    end = pod_end(pod)
    said = waiting_reason(pod) if is_pending(pod) else end.said if end is not None and end.code else ""
    return {
        "host": host_of(pod),
        "name": str(pod["metadata"]["name"]),
        "phase": str(pod["status"].get("phase", "Pending")),
        "node": str(pod.get("spec", {}).get("nodeName", "")),
        "said": said,
    }
