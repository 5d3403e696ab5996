"""Options of ``backend=ssh``, and those of every backend that has a hostfile."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from launcher.config.backend.base import DEFAULT_GLOBS, Backend, forwarded_names
from launcher.config.backend.hostfile import filter_hosts, read_hostfile
from launcher.config.paths import PathText
from launcher.errors import ConfigError
from launcher.protocol.plan import Host


@dataclass(frozen=True, kw_only=True)
class HostfileBackend(Backend):
    """Ranks are processes of the machines that a hostfile names."""

    probes_hosts: ClassVar[bool] = True

    hostfile: PathText = "hostfile"
    """File that names the machines: ``host slots=N``, one per line, see hostfile.example."""

    include: str | None = None
    """Only these hosts or slots: ``node1@node2:0,2``."""

    exclude: str | None = None
    """All but these hosts or slots."""

    python: PathText | None = None
    """Interpreter on the hosts; the path of the one that runs this command, when not set."""

    forward: tuple[str, ...] = ()
    """Further environment variables that hosts get, as globs.
    Those of NCCL, HF, WANDB and the like are always included."""

    heartbeat_timeout_s: float = 5.0
    """Seconds without a message after which a host and this machine count each other as lost."""

    min_hosts: int | None = None
    """Restarts continue with fewer hosts, down to this number; all of them, when not set."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject times and counts that cannot be."""
        yield from super().validate()
        yield from self.validate_minimum(1, "min_hosts")
        yield from self.validate_minimum(2, "heartbeat_timeout_s")  # signs of life are a second apart

    def hosts(self, *, max_ranks: int | None) -> tuple[Host, ...]:
        """Return the hosts of the file that the filters leave."""
        entries = filter_hosts(read_hostfile(self.hostfile), include=self.include, exclude=self.exclude)
        return tuple(
            Host(
                name=entry.name,
                slots=entry.slots if self.ranks == "auto" else self.ranks,
                slot_ids=() if self.ranks != "auto" or entry.devices == tuple(range(entry.slots)) else entry.devices,
                address=entry.name,
                ssh_destination=entry.ssh_destination,
                is_probed=False,
                cores=0,
                python=self.python or sys.executable,
            )
            for entry in entries
        )

    def forwards(self, environ: Mapping[str, str]) -> tuple[str, ...]:
        """Return the names of what the allow-list lets through."""
        return forwarded_names(environ, (*DEFAULT_GLOBS, *self.forward))

    def min_hosts_for_restart(self, begun: int) -> int:
        """Return ``min_hosts``, where it is set."""
        return self.min_hosts or begun

    def validate_hosts(self, hosts: Sequence[Host]) -> Iterator[ConfigError]:
        """Reject more ranks than slots, and to go on with more hosts than there are."""
        if self.min_hosts is not None and self.min_hosts > len(hosts):
            yield self.error("min_hosts", f"the run starts on {len(hosts)}", f"set backend.min_hosts={len(hosts)}")
        if self.ranks == "auto" or not Path(self.hostfile).is_file():
            return
        for entry in filter_hosts(read_hostfile(self.hostfile), include=self.include, exclude=self.exclude):
            if self.ranks > entry.slots:
                why = f"{entry.name} has {entry.slots} slots"
                yield ConfigError(
                    "backend.ranks",
                    self.ranks,
                    why=why,
                    fix="leave backend.ranks out to use every slot, or raise slots= in the file",
                    source=f"{self.hostfile}:{entry.line}",
                )
                return


CodeSource = Literal["shared", "sent"]
"""Source of the code on hosts: a shared path, or the working tree sent to them."""


@dataclass(frozen=True, kw_only=True)
class SshBackend(HostfileBackend):
    """Ranks are processes of machines that OpenSSH reaches without a password."""

    kind: ClassVar[str] = "ssh"

    code: CodeSource = "shared"
    """Code on the hosts: ``shared`` is the same path as here, ``sent`` sends the working tree."""

    ssh_config: PathText | None = None
    """Configuration file for ssh instead of ``~/.ssh/config``."""

    ssh_options: tuple[str, ...] = ()
    """More arguments for ssh, one word each."""

    def validate_hosts(self, hosts: Sequence[Host]) -> Iterator[ConfigError]:
        """Reject a configuration file that is not there: ssh would continue without it."""
        yield from super().validate_hosts(hosts)
        if self.ssh_config is not None and not Path(self.ssh_config).is_file():
            why = "is a folder" if Path(self.ssh_config).is_dir() else "no such file"
            yield self.error("ssh_config", why, "leave it out to use ~/.ssh/config")
