"""What a run cannot have on hosts that keep its directory each on a disk of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from launcher.config import Run
from launcher.doctor.facts import HostFacts
from launcher.errors import ConfigError
from launcher.plan import Host

_SHOWN = 3
"""Names of hosts in one sentence."""


def refuse_unshared(
    run: Run, hosts: Sequence[Host], facts: Mapping[str, HostFacts], *, folder: str
) -> Iterator[ConfigError]:
    """Refuse checkpoints, and restarts from them, where every host would hold nothing but its own part of them.

    A single host holds whole ones, wherever it keeps them; so do hosts with a file server that this machine is not on.

    Args:
        run: the configuration.
        hosts: who takes part.
        facts: of those that answered, by name.
        folder: the run directory.
    """
    apart = [host.name for host in hosts if host.name in facts and not facts[host.name].storage.is_ours]
    servers = {facts[host.name].storage.served_by for host in hosts if host.name in facts}
    if len(hosts) < 2 or not apart or (len(servers) == 1 and "" not in servers):
        return
    more = f" and {len(apart) - _SHOWN} more" if len(apart) > _SHOWN else ""
    why = f"not all hosts share {folder} ({', '.join(apart[:_SHOWN])}{more}), and "
    shared = "set run.root to a folder that all of them share"
    off = "checkpoint.every=0 checkpoint.at_end=false"
    policy = run.checkpoint
    for option, value in (("checkpoint.every", policy.every), ("checkpoint.at_end", policy.at_end or None)):
        if value:
            whose = "each would keep only its own part of a checkpoint"
            yield ConfigError(option, value, why=why + whose, fix=f"{shared}, or {off}")
    if run.backend.restarts:
        needs = "a restart would find no whole checkpoint"
        yield ConfigError("backend.restarts", run.backend.restarts, why=why + needs, fix=f"{shared}, or 0")
