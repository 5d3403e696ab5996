"""What each rank's environment gets on top of what it inherits, and what a user may not put there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher.agents import device_words
from launcher.config import Run
from launcher.errors import ConfigError
from launcher.forward import DEFAULT_GLOBS, names
from launcher.plan import Host, Identity
from launcher.secrecy import is_secret

_OURS = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"})

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""Without them Gloo takes the interface that the host's own name resolves to: on Debian, the loopback."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One host among those of the run."""

    host: Host
    number: int
    """From 0, in the order of hosts."""
    num_hosts: int


def environment(
    run: Run, place: Place, identity: Identity, *, ops_folder: str, inherited: Collection[str] = ()
) -> dict[str, str]:
    """Return the variables added for the ranks of one host; ``backend.env`` comes last and wins.

    Args:
        run: the run.
        place: the host.
        identity: of the run.
        ops_folder: where DeepSpeed's native ops are built for this environment.
        inherited: names of variables that the ranks have already.
    """
    host = place.host
    added = {
        "LAUNCHER_HOST": host.name,
        "LAUNCHER_RUN_ID": identity.run_id,
        "LAUNCHER_RUN_HASH": identity.run_hash,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",  # its threads and a later fork do not go together
        # DeepSpeed reads these three and sets them only in its own launcher.
        "LOCAL_SIZE": str(host.slots),
        "CROSS_RANK": str(place.number),
        "CROSS_SIZE": str(place.num_hosts),
    }
    if host.is_known or run.backend.threads != "auto":
        added["OMP_NUM_THREADS"] = str(threads(run, host))
    if "deepspeed" in (run.parallel.engine, run.backend.agent):
        if not host.login:  # other machines have processors of their own: their agents know the folder
            added["TORCH_EXTENSIONS_DIR"] = ops_folder
        if host.is_known:
            added["DS_ACCELERATOR"] = "cuda" if host.devices else "cpu"
    if host.slots < len(host.devices) or (host.devices and host.slot_ids):
        added["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, device_words(host)))
    interface = host.interface if place.num_hosts > 1 else "lo"  # ranks of one host are reached by no other machine
    if interface:
        added |= {name: interface for name in _INTERFACES if name not in inherited}
    return {**added, **run.backend.env}


def threads(run: Run, host: Host) -> int:
    """Return OMP_NUM_THREADS: the host's cores shared among its ranks, at least 1."""
    return max(1, host.cores // host.slots) if run.backend.threads == "auto" else run.backend.threads


def refusals(env: Mapping[str, str], *, forward: Sequence[str] | None = None) -> Iterator[ConfigError]:
    """Yield what may not stand in ``backend.env``: secrets, because plans are written down, and what we set.

    Args:
        env: the variables.
        forward: globs of ``backend.forward``, where the backend has other hosts than this machine.
    """
    for name, value in env.items():
        if is_secret(name, value):
            fix = f"leave it out and export the variable {name} in your shell: ranks inherit it, and no file holds it"
            if forward is not None and not names({name: value}, (*DEFAULT_GLOBS, *forward)):
                fix += f"; add backend.forward=[{','.join((*forward, name))}], which sends it to the hosts"
            yield ConfigError(f"backend.env.{name}", why="looks like a secret, and plans are written to disk", fix=fix)
        elif name in _OURS or name.startswith("LAUNCHER_"):
            fix = "leave it out" if name != "CUDA_VISIBLE_DEVICES" else "set it in your shell; the plan follows it"
            yield ConfigError(f"backend.env.{name}", why="is set by the launcher", fix=fix)
