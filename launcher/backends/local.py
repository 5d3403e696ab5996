"""Executor of ``backend=local``: the agent is a child of this process."""

from __future__ import annotations

from typing import ClassVar

from launcher.backends.base import AgentExecutor
from launcher.config.backend.local import LocalBackend
from launcher.plugins.loading import path_environment
from launcher.protocol.plan import Host
from launcher.remote.command import RemoteCommand


class LocalExecutor(AgentExecutor[LocalBackend]):
    """Starts ranks on this machine."""

    agent_module: ClassVar[str] = "launcher.supervision.agent_entry"
    """The agent itself: if it is killed, the session adopts and kills its descendants."""

    def remote_command(self, host: Host, module: str) -> RemoteCommand:
        """Return a command that uses no network."""
        return RemoteCommand(argv=(host.python, "-m", module), env=path_environment(self.plugins))
