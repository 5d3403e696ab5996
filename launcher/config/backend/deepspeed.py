"""Options of ``backend=deepspeed``: the ``deepspeed`` command starts every host's ranks."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from launcher.config.backend.ssh import HostfileBackend
from launcher.config.paths import PathText
from launcher.errors import ConfigError
from launcher.protocol.plan import Host
from launcher.utils.system import code_root

_PROGRAMS = {"pdsh": ("pdsh", "pdsh"), "openmpi": ("mpirun", "openmpi-bin"), "slurm": ("srun", "slurm-client")}
"""Program of each runner, and its Debian package."""

_SAFE = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
"""Characters that every shell on the way, and pdsh with its ``%``, leave unchanged."""


@dataclass(frozen=True, kw_only=True)
class DeepspeedBackend(HostfileBackend):
    """Ranks start by ``deepspeed --hostfile``; all hosts share the run directory."""

    kind: ClassVar[str] = "deepspeed"

    agent: Literal["torchrun", "deepspeed"] = "deepspeed"
    """Which launcher starts the ranks of one host: deepspeed's own."""

    runner: Literal["pdsh", "openmpi", "slurm"] = "pdsh"
    """Program by which deepspeed reaches the hosts."""

    ssh_config: PathText | None = None
    """Configuration file for ssh instead of ``~/.ssh/config``."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject what deepspeed has no way to do."""
        yield from super().validate()
        if self.agent != "deepspeed":
            yield self.error("agent", "deepspeed itself starts the ranks", "leave it out, or set backend=ssh")
        if self.python not in (None, sys.executable):
            fix = f"start the run with that interpreter, or set backend=ssh; this one is {sys.executable}"
            yield self.error("python", "deepspeed uses the interpreter of this machine on every host", fix)
        if self.min_hosts is not None:
            yield self.error(
                "min_hosts",
                "needs an agent on each host, which this backend does not start",
                "leave it out, or set backend=ssh",
            )
        if self.ssh_config is not None and not _SAFE.fullmatch(str(Path(self.ssh_config).absolute())):
            yield self.error("ssh_config", "pdsh does not quote its path", "use a path without special characters")

    def validate_hosts(self, hosts: Sequence[Host]) -> Iterator[ConfigError]:
        """Reject hosts, paths and a machine that the chosen runner cannot work with."""
        yield from super().validate_hosts(hosts)
        if self.ssh_config is not None and not Path(self.ssh_config).is_file():
            why = "is a folder" if Path(self.ssh_config).is_dir() else "no such file"
            yield self.error("ssh_config", why, "leave it out to use ~/.ssh/config")
        program, package = _PROGRAMS[self.runner]
        if shutil.which(program) is None:
            fix = f"install it (Debian: apt install {package}) or set backend=ssh"
            yield self.error("runner", f"{program} is not installed here", fix)
        for what, path in (("the program", str(code_root())), ("the interpreter", sys.executable)):
            if not _SAFE.fullmatch(path):
                why = f"deepspeed does not quote the path of {what} ({path}) in the shells of the hosts"
                yield self.error("kind", why, "move it to a path without special characters, or set backend=ssh")
        yield from self._unreachable(hosts)
        if self.runner == "slurm" and len({host.slots for host in hosts}) > 1:
            yield self.error("hostfile", "srun needs equal slots on all hosts", "write the same slots=N everywhere")

    @property
    def rank_launcher(self) -> str:
        """Deepspeed starts each rank from elsewhere."""
        return "external"

    def _unreachable(self, hosts: Sequence[Host]) -> Iterator[ConfigError]:
        """Yield logins that the runner has no word for."""
        for host in hosts:
            if host.ssh_destination == host.name:
                continue
            if self.runner == "pdsh" and re.fullmatch(r"[^@:\[\]]+@[^@:\[\]]+", host.ssh_destination):
                continue
            why = f"{self.runner} cannot reach {host.ssh_destination} under another user, port or IPv6 address"
            fix = "define an alias for it in your ssh configuration and write that, or set backend=ssh"
            yield ConfigError("backend.hostfile", self.hostfile, why=why, fix=fix)
