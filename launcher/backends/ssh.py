"""Executor of ``backend=ssh``: the agent of each host runs behind an ssh of its own."""

from __future__ import annotations

import os
from functools import cached_property

from launcher.backends.base import AgentExecutor
from launcher.config.backend.ssh import SshBackend
from launcher.plugins.loading import path_environment, plugins_of
from launcher.protocol.plan import Host, Plan
from launcher.remote.bundle import Bundle, make_bundle
from launcher.remote.command import RemoteCommand, prologue, ssh_command
from launcher.utils.system import code_root
from launcher.utils.text import shell_command

_MAX_HOSTS_SHOWN = 3
"""Number of hosts whose command a plan shows."""


class SshExecutor(AgentExecutor[SshBackend]):
    """Starts ranks on the hosts of a hostfile, which OpenSSH reaches without a password."""

    def remote_command(self, host: Host, module: str) -> RemoteCommand:
        """Return the ssh command; its stdin carries what runs there."""
        cwd = os.getcwd()  # noqa: PTH109
        if self.backend.code == "sent":
            text = prologue(module, cwd=cwd, bundle=self._bundle)
        else:
            text = prologue(module, cwd=cwd, pythonpath=(str(code_root()),), env=path_environment(self.plugins))
        return ssh_command(host, prologue=text, config=self.backend.ssh_config, options=self.backend.ssh_options)

    def render(self, plan: Plan, *, snapshot: str) -> str:
        """Return the ssh commands of the first hosts; the others differ only in the destination."""
        shown = plan.hosts[:_MAX_HOSTS_SHOWN]
        lines = [shell_command(self.remote_command(host.host, self.agent_module).argv) for host in shown]
        if len(plan.hosts) > len(shown):
            lines.append(f"# and {len(plan.hosts) - len(shown):,} more, which differ in the destination only")
        lines.append("# over its stdin: the bootstrap, the plan of the host, run.yaml and the variables forwarded")
        if self._bundle is not None:
            lines.append(f"# and the working tree: {len(self._bundle.payload):,} bytes, SHA-256 {self._bundle.sha256}")
        if plan.forwarded_env:
            lines.append(f"# forwarded: {' '.join(plan.forwarded_env)}")
        return "\n".join(lines) + "\n"

    @cached_property
    def _bundle(self) -> Bundle | None:
        """The working tree and the packages of the run's plugins, packed once for all hosts."""
        return make_bundle(code_root(), plugins_of(self.plugins)) if self.backend.code == "sent" else None
