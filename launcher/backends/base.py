"""Executor of backends that start an agent on every host, which supervises the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from launcher.execution.executor import B, Executor
from launcher.protocol.outcome import RunOutcome
from launcher.protocol.plan import HostPlan, Plan
from launcher.protocol.rundir import RunDir


class AgentExecutor(Executor[B]):
    """Runs an agent on every host with ``remote_command`` and the session in this process."""

    agent_module: ClassVar[str] = "launcher.supervision.agent_supervisor"
    """Module that starts the agent below a process that survives it.
    That process kills the agent's descendants."""

    def submit(self, plan: Plan) -> RunOutcome:
        """Start ``plan`` under an agent on every host."""
        from launcher.supervision.connection import PipeConnection  # printing a plan imports no session
        from launcher.supervision.session import run_session

        run_dir = RunDir(Path(plan.run_dir))

        def connect(host: HostPlan) -> PipeConnection:
            name = host.host.name
            remote = self.remote_command(host.host, self.agent_module)
            return PipeConnection(name, remote, log=run_dir.log_of(name, "agent"))

        return run_session(plan, connect, job=self.job, on_first_step=self.on_first_step)

    @property
    def job(self) -> dict[str, str]:
        """Scheduler's names of this run, for ``session.json``; empty without a scheduler."""
        return {}
