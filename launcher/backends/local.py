"""This machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from launcher.backends.base import Backend

if TYPE_CHECKING:
    from launcher.plan import Host, HostPlan, Plan
    from launcher.remote.command import Remote
    from launcher.supervise.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class Local(Backend):
    """Ranks are processes of this machine."""

    kind: ClassVar[str] = "local"

    def hosts(self, *, max_ranks: int | None) -> tuple[Host, ...]:
        """Return this machine."""
        from launcher.machine import this_machine

        return (this_machine(self.ranks, max_ranks=max_ranks),)

    def remote(self, host: Host, module: str) -> Remote:
        """Return a command without a network in it."""
        from launcher.remote.command import Remote

        return Remote(argv=(host.python, "-m", module))

    def submit(self, plan: Plan) -> Outcome:
        """Start ``plan`` under an agent that is a child of this process."""
        from pathlib import Path

        from launcher.rundir import RunDir
        from launcher.supervise.connection import PipeConnection
        from launcher.supervise.session import run_session

        run_dir = RunDir(Path(plan.run_dir))

        def connect(host: HostPlan) -> PipeConnection:
            remote = self.remote(host.host, "launcher.supervise.agent")
            return PipeConnection(host.host.name, remote, log=run_dir.log_of(host.host.name, "agent"))

        return run_session(plan, connect)
