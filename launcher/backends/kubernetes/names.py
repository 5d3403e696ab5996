"""What things are called in the cluster, and what the cluster accepts as a name."""

from __future__ import annotations

import re
from typing import Literal

Workload = Literal["indexed_job", "jobset", "pytorchjob", "trainjob"]

REPLICATED_JOB = "node"
"""Name of the only group of pods inside of a JobSet; Kubeflow's Trainer looks for it."""

_MAX_LABEL = 63
_LONGEST_SUFFIX = len(f"-{REPLICATED_JOB}-0-99999")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"(?=.{{1,253}}\Z){_LABEL.pattern}(\.{_LABEL.pattern})*")
_QUANTITY = re.compile(r"(?P<number>[1-9][0-9]*)(?P<unit>[kMGT]i?|Ki)?")
_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def job_name(run_name: str, run_id: str) -> str:
    """Return the name of everything that belongs to one run: a DNS label that begins with a letter.

    What the cluster does not take is replaced by dashes, and so long a name is cut that the host name of every pod
    remains a DNS label too. The run id keeps apart runs whose names become alike.
    """
    tail = _dashed(run_id)
    room = _MAX_LABEL - _LONGEST_SUFFIX - len(tail) - 1
    head = _dashed(run_name)[:room].strip("-")
    if not head or not head[0].isalpha():
        head = f"run-{head}"[:room].strip("-")
    return f"{head}-{tail}"


def _dashed(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def address_of(workload: Workload, job: str, index: int) -> str:
    """Return the DNS name of the pod with ``index``, as its controller arranges it.

    Of a PyTorchJob only the first pod has one; the others are never dialled.
    """
    match workload:
        case "indexed_job":
            return f"{job}-{index}.{job}"
        case "jobset" | "trainjob":
            return f"{job}-{REPLICATED_JOB}-0-{index}.{job}"
        case "pytorchjob":
            return f"{job}-master-0" if index == 0 else f"{job}-worker-{index - 1}"


def is_label(text: str) -> bool:
    """Whether ``text`` may name a namespace."""
    return _LABEL.fullmatch(text) is not None


def is_subdomain(text: str) -> bool:
    """Whether ``text`` may name most other things: a claim, a Secret, a service account."""
    return _SUBDOMAIN.fullmatch(text) is not None


def bytes_of(quantity: str) -> int | None:
    """Return the bytes of ``64Gi``; ``None`` for what is not a whole number with a unit."""
    found = _QUANTITY.fullmatch(quantity)
    return int(found["number"]) * _UNITS.get(found["unit"] or "", 1) if found else None
