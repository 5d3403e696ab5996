"""Command lines and environment of the ranks of one host, for torchrun and DeepSpeed.

A rank gets everything through its run directory and its environment. No argument follows the module name: torchrun
parses arguments of the script that look like a prefix of its own flags.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from launcher.config.run import Run
from launcher.protocol.plan import Host, RunIdentity
from launcher.protocol.rundir import encode_run_dir
from launcher.utils.system import LOOPBACK

RANK_MODULE = "launcher.jobs.rank"
EXTERNAL_RANK_MODULE = "launcher.jobs.external_rank"
AgentArgv = Callable[[Sequence[Host], RunIdentity], list[tuple[str, ...]]]


def torchrun_argv(hosts: Sequence[Host], identity: RunIdentity) -> list[tuple[str, ...]]:
    """Return torchrun's argv for each host.

    The static rendezvous fails at once when the port is in use, so the caller can retry on another port. No
    restarts: a resumed run is a new plan.
    """
    return [
        (
            *(host.python, "-m", "torch.distributed.run" if len(hosts) > 1 else "launcher.jobs.torchrun"),
            *("--nnodes", str(len(hosts))),
            *("--nproc-per-node", str(host.slots)),
            *("--node-rank", str(number)),
            *("--rdzv-backend", "static"),
            *("--master-addr", master_address(hosts)),
            *("--master-port", str(identity.port)),
            *("--max-restarts", "0"),
            *("--log-dir", f"{identity.run_dir}/logs/torchrun"),  # otherwise torchrun leaves a folder in /tmp
            *("--module", RANK_MODULE, identity.run_dir),
        )
        for number, host in enumerate(hosts)
    ]


def deepspeed_argv(hosts: Sequence[Host], identity: RunIdentity) -> list[tuple[str, ...]]:
    """Return the argv of ``deepspeed.launcher.launch`` for each host.

    DeepSpeed writes the devices in ``world_info`` into CUDA_VISIBLE_DEVICES, so these are the host's own indices, or
    -1, which hides every GPU, for ranks on the CPU.

    Every host gets ``world_info`` with all hosts, so the size of these plans is quadratic in the number of hosts.
    """
    world = {host.name: cuda_visible_devices(host) or [-1] * host.slots for host in hosts}
    encoded = base64.urlsafe_b64encode(json.dumps(world, separators=(",", ":")).encode()).decode()
    return [
        (
            *(host.python, "-m", "deepspeed.launcher.launch"),
            f"--world_info={encoded}",
            f"--node_rank={number}",
            f"--master_addr={master_address(hosts)}",
            f"--master_port={identity.port}",
            *("--no_local_rank", "--log_level=warning"),
            *("--module", RANK_MODULE, identity.run_dir),
        )
        for number, host in enumerate(hosts)
    ]


def external_argv(hosts: Sequence[Host], identity: RunIdentity) -> list[tuple[str, ...]]:
    """Return the argv that becomes a rank on each host, for launchers that start every rank."""
    return [(host.python, "-u", "-m", EXTERNAL_RANK_MODULE, encode_run_dir(identity.run_dir)) for host in hosts]


def master_address(hosts: Sequence[Host]) -> str:
    """Return the address of rank 0; the loopback interface if all ranks are on one host."""
    return hosts[0].address if len(hosts) > 1 else LOOPBACK


def cuda_visible_devices(host: Host) -> list[int | str]:
    """Return the CUDA_VISIBLE_DEVICES entries of the GPUs that get a rank.

    Empty when the ranks compute on the CPU.
    """
    chosen = host.slot_ids or range(host.slots)
    words = [host.device_ids[slot] for slot in chosen if slot < len(host.device_ids)]
    return [int(word) if word.isdigit() else word for word in words]


AGENTS: dict[str, AgentArgv] = {"torchrun": torchrun_argv, "deepspeed": deepspeed_argv}
"""Every value of ``backend.agent``."""
RANK_LAUNCHERS: dict[str, AgentArgv] = {**AGENTS, "external": external_argv}
"""Every value of ``Backend.rank_launcher``."""
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""Interface variables.
Without them Gloo binds the interface that the host's own name resolves to: on Debian, the loopback."""


@dataclass(frozen=True, kw_only=True)
class HostPosition:
    """One host among those of the run."""

    host: Host
    number: int
    """From 0, in the order of hosts."""
    num_hosts: int


def rank_environment(
    run: Run, place: HostPosition, identity: RunIdentity, *, ops_folder: str, inherited: Collection[str] = ()
) -> dict[str, str]:
    """Return the variables added for the ranks of one host; ``backend.env`` comes last and wins.

    Args:
        run: the run.
        place: the host.
        identity: of the run.
        ops_folder: where DeepSpeed's native ops are built for this environment.
        inherited: names of variables that the ranks inherit.
    """
    host = place.host
    added = {
        "LAUNCHER_HOST": host.name,
        "LAUNCHER_RUN_ID": identity.run_id,
        "LAUNCHER_RUN_HASH": identity.run_hash,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",  # its threads do not survive a later fork
        # DeepSpeed reads these three and sets them only in its own launcher.
        "LOCAL_SIZE": str(host.slots),
        "CROSS_RANK": str(place.number),
        "CROSS_SIZE": str(place.num_hosts),
    }
    if host.is_probed or run.backend.threads != "auto":
        added["OMP_NUM_THREADS"] = str(omp_num_threads(run, host))
    if "deepspeed" in (run.parallel.engine, run.backend.agent):
        if not host.ssh_destination:  # other machines may have other processors: their agents choose the folder
            added["TORCH_EXTENSIONS_DIR"] = ops_folder
        if host.is_probed:
            added["DS_ACCELERATOR"] = "cuda" if host.devices else "cpu"
    if host.slots < len(host.devices) or (host.devices and host.slot_ids):
        added["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, cuda_visible_devices(host)))
    interface = (
        host.interface if place.num_hosts > 1 else "lo"
    )  # no other machine connects to ranks that are all on one host
    if interface:
        added |= {name: interface for name in _INTERFACES if name not in inherited}
    return {**added, **run.backend.env}


def omp_num_threads(run: Run, host: Host) -> int:
    """Return OMP_NUM_THREADS: the host's cores shared among its ranks, at least 1."""
    return max(1, host.cores // host.slots) if run.backend.threads == "auto" else run.backend.threads
