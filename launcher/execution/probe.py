"""Probe the hosts before a start: facts go into the plan, errors end the attempt."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from launcher.doctor.examine import default_deadline_s, examine_hosts
from launcher.doctor.protocol import ProbeRequest
from launcher.doctor.report import DoctorReport, Level, lines_of
from launcher.doctor.rules import validate_shared_run_dir
from launcher.errors import ConfigErrors, Unfit
from launcher.execution.executor import AnyExecutor
from launcher.execution.prepare import PreparedRun, replan
from launcher.protocol.plan import Host


def probe_and_replan(prepared: PreparedRun, executor: AnyExecutor, *, is_fresh: bool = True) -> PreparedRun:
    """Return the run planned with the probed facts of its hosts.

    Args:
        prepared: the run, planned with assumed facts.
        executor: reaches the hosts.
        is_fresh: check this machine's disk and ports too; not for a run that has its directory already.

    Raises:
        Unfit: a host is unfit for the run; nothing was started.
        ConfigErrors: it cannot work on these hosts (more ranks than GPUs, checkpoints without a shared disk).
    """
    report = _ask(prepared, executor)
    errors = [finding for finding in report.findings if finding.level is Level.ERROR]
    if errors:
        raise Unfit("\n".join(f"{found.host}: {found.what}\n  → {found.remedy}" for found in errors))
    if refused := list(
        validate_shared_run_dir(prepared.run, prepared.hosts, report.facts, folder=prepared.plan.run_dir)
    ):
        raise ConfigErrors(refused)
    for line in lines_of(report.findings):
        print(line, file=sys.stderr)
    plan = prepared.plan
    hosts = report.probed(prepared.hosts)
    port = report.port or plan.port
    folder = Path(plan.run_dir)
    planned = replan(prepared.run, hosts, run_id=plan.run_id, folder=folder, port=port, is_fresh=is_fresh)
    return replace(planned, locks=prepared.locks)


def probe_for_restart(prepared: PreparedRun, executor: AnyExecutor) -> tuple[tuple[Host, ...], int]:
    """Return the hosts that a restart can use, and a free port on the first of them."""
    report = _ask(prepared, executor)
    unfit = {finding.host for finding in report.findings if finding.level is Level.ERROR}
    hosts = report.probed([host for host in prepared.hosts if host.name not in unfit])
    return hosts, report.port or prepared.plan.port


def _ask(prepared: PreparedRun, executor: AnyExecutor) -> DoctorReport:
    backend = prepared.run.backend
    port = None if backend.port == "auto" else backend.port
    request = ProbeRequest(run_dir=prepared.plan.run_dir, port=port, plugins=prepared.run.plugins)
    deadline_s = default_deadline_s(len(prepared.hosts), quick=True)
    return examine_hosts(prepared.hosts, executor.remote_command, request, quick=True, deadline_s=deadline_s)
