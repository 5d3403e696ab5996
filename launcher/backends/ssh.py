"""Machines reached by ssh, with an agent on each."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from launcher.backends.on_hosts import Code, OnHosts
from launcher.errors import ConfigError
from launcher.paths import PathText

if TYPE_CHECKING:
    from launcher.plan import Host, HostPlan, Plan
    from launcher.remote.bundle import Bundle
    from launcher.remote.command import Remote
    from launcher.supervise.outcome import Outcome

_WARDEN = "launcher.supervise.warden"


@dataclass(frozen=True, kw_only=True)
class Ssh(OnHosts):
    """Ranks are processes of machines that OpenSSH reaches without a password."""

    kind: ClassVar[str] = "ssh"

    code: Code = "shared"
    """Where hosts find this program: ``shared`` is the same path as here, ``sent`` sends the working tree."""

    ssh_config: PathText | None = None
    """Configuration file for ssh instead of ``~/.ssh/config``."""

    ssh_options: tuple[str, ...] = ()
    """More arguments for ssh, one word each."""

    def refusals(self, hosts: Sequence[Host]) -> Iterator[ConfigError]:
        """Refuse a configuration file that is not there: ssh would go on without it."""
        yield from super().refusals(hosts)
        if self.ssh_config is not None and not Path(self.ssh_config).is_file():
            yield self.refuse("ssh_config", "no such file", "leave it out to use ~/.ssh/config")

    def remote(self, host: Host, module: str) -> Remote:
        """Return the ssh command; what it runs there comes over its stdin."""
        from launcher.remote.bootstrap import prologue
        from launcher.remote.bundle import code_root
        from launcher.remote.ssh import ssh_remote

        shared = (str(code_root()),) if self.code == "shared" else ()
        text = prologue(module, cwd=os.getcwd(), pythonpath=shared, bundle=self._bundle)  # noqa: PTH109
        return ssh_remote(host, prologue=text, config=self.ssh_config, options=self.ssh_options)

    def render(self, plan: Plan, *, snapshot: str) -> str:
        """Return the ssh command of every host; hosts differ in nothing but the destination."""
        lines = [shlex.join(self.remote(host.host, _WARDEN).argv) for host in plan.hosts[:_SHOWN]]
        if len(plan.hosts) > _SHOWN:
            lines.append(f"# and {len(plan.hosts) - _SHOWN:,} more, which differ in the destination only")
        lines.append("# over its stdin: the bootstrap, the plan of the host, run.yaml and the variables forwarded")
        if self._bundle is not None:
            lines.append(f"# and the working tree: {len(self._bundle.payload):,} bytes, SHA-256 {self._bundle.sha256}")
        if plan.forward:
            lines.append(f"# forwarded: {' '.join(plan.forward)}")
        return "\n".join(lines) + "\n"

    def submit(self, plan: Plan) -> Outcome:
        """Start ``plan`` under an agent on every host, each behind an ssh of its own."""
        from launcher.rundir import RunDir
        from launcher.supervise.connection import PipeConnection
        from launcher.supervise.session import run_session

        run_dir = RunDir(Path(plan.run_dir))

        def connect(host: HostPlan) -> PipeConnection:
            name = host.host.name
            return PipeConnection(name, self.remote(host.host, _WARDEN), log=run_dir.log_of(name, "agent"))

        return run_session(plan, connect)

    @cached_property
    def _bundle(self) -> Bundle | None:
        """The working tree, packed once for all hosts."""
        from launcher.remote.bundle import code_root, make_bundle

        return make_bundle(code_root()) if self.code == "sent" else None


_SHOWN = 3
"""Hosts whose command a plan shows."""
