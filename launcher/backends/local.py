"""This machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from launcher.backends.base import Backend

if TYPE_CHECKING:
    from launcher.plan import HostPlan, Plan
    from launcher.supervise.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class Local(Backend):
    """Ranks are processes of this machine."""

    kind: ClassVar[str] = "local"

    def submit(self, plan: Plan) -> Outcome:
        """Start ``plan`` under an agent that is a child of this process."""
        from pathlib import Path

        from launcher.rundir import RunDir
        from launcher.supervise.connection import LocalConnection
        from launcher.supervise.session import run_session

        run_dir = RunDir(Path(plan.run_dir))

        def connect(host: HostPlan) -> LocalConnection:
            return LocalConnection(host.host.name, log=run_dir.log_of(host.host.name, "agent"))

        return run_session(plan, connect)
