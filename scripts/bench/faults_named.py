"""Whom a launcher names as the cause, and whether that is right."""

from __future__ import annotations

import re

from faults_cells import Cell
from faults_run import Run

from launcher.protocol.rundir import RunDir
from launcher.utils.files import read_json

_ROOT_CAUSE = re.compile(r"Root Cause \(first observed failure\):\s*\[0\]:.*?host\s*:\s*(\S+).*?rank\s*:\s*(\d+)", re.S)
_DS_EXIT = re.compile(r"^(?:(\S+): )?.*--local_rank=(\d+).*exits with return code = (-?\d+)", re.M)
_BROKEN = re.compile(r"time[d ]*out|closed|lost|unreachable|reset|refused|no route|broken pipe", re.I)


def named_by_ours(cell: Cell, run: Run) -> tuple[str, bool]:
    """Return what ``failure.json`` and ``result.json`` say, and whether it is right."""
    run_dir = RunDir(run.job.folder)
    status = read_json(run_dir.result)["status"] if run_dir.result.exists() else "no result"
    if not run_dir.failure.exists():
        is_right = status == "cancelled" if cell.is_cancellation else cell.target == "parent"
        return status, is_right
    failure = read_json(run_dir.failure)
    host, rank, reason = failure["host"], failure["rank"], failure["reason"]
    is_there = host == run.job.hosts[cell.host] and not cell.is_cancellation
    match cell.target:
        case "rank":
            is_right = is_there and rank == cell.rank
        case "agent" | "torchrun":
            is_right = is_there and rank is None and f"{cell.target} on {host}" in reason
        case _:
            is_right = is_there and rank is None
    return reason, is_right


def named_by_torchrun(cell: Cell, run: Run, said: str) -> tuple[str, bool]:
    """Return what torchrun printed; of several root causes, one a host, the first counts."""
    if cell.target == "rank":
        roots = _ROOT_CAUSE.findall(said)
        return f"root causes: {roots}" if roots else "", bool(roots) and int(roots[0][1]) == cell.rank
    if cell.target == "torchrun":
        found = re.search(r"got signal: (\d+)", said)
        return found[0] if found else "", found is not None and int(found[1]) == cell.signal
    return _host_named(cell, run, said)


def named_by_deepspeed(cell: Cell, run: Run, said: str) -> tuple[str, bool]:
    """Return what deepspeed printed; of several failed ranks the first counts."""
    if cell.target == "rank":
        found = _DS_EXIT.findall(said)
        local = 0 if cell.num_hosts > 1 else cell.rank
        host = run.job.hosts[cell.host] if cell.num_hosts > 1 else ""
        is_right = bool(found) and found[0] == (host, str(local), str(-(cell.signal or 0)))
        return f"exits: {found}" if found else "", is_right
    if cell.target == "torchrun":
        received = re.search(r"Main process received (SIG\w+)", said)
        return received[0] if received else "", received is not None and received[1] == f"SIG{cell.how}"
    return _host_named(cell, run, said)


def _host_named(cell: Cell, run: Run, said: str) -> tuple[str, bool]:
    """Return the first line that names the host that was struck and says that something broke."""
    if cell.target == "parent":
        return "", True
    name = run.job.hosts[cell.host]
    address = run.job.lab.address(name) if run.job.lab else name
    for line in said.splitlines():
        if (name in line or address in line) and _BROKEN.search(line):
            return line, True
    return "", False
