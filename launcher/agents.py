"""How the ranks of one host are started: the argv of torchrun and of DeepSpeed's per-host launcher.

A rank is told everything through its run directory and its environment. Nothing else follows the module name: torchrun
takes what looks like a beginning of its own flags out of a script's arguments, wherever it stands.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence

from launcher.plan import Host, Identity
from launcher.ports import LOOPBACK

RANK_MODULE = "launcher.rank"
Agent = Callable[[Sequence[Host], Identity], list[tuple[str, ...]]]


def torchrun(hosts: Sequence[Host], identity: Identity) -> list[tuple[str, ...]]:
    """Return torchrun's argv for each host.

    The static rendezvous fails at once when the port is taken, which lets the caller try another. No restarts: a
    resumed run is a new plan.
    """
    return [
        (
            *(host.python, "-m", "torch.distributed.run" if len(hosts) > 1 else "launcher.torchrun"),
            *("--nnodes", str(len(hosts))),
            *("--nproc-per-node", str(host.slots)),
            *("--node-rank", str(number)),
            *("--rdzv-backend", "static"),
            *("--master-addr", master_address(hosts)),
            *("--master-port", str(identity.port)),
            *("--max-restarts", "0"),
            *("--log-dir", f"{identity.run_dir}/logs/torchrun"),  # else it leaves a folder in /tmp
            *("--module", RANK_MODULE, identity.run_dir),
        )
        for number, host in enumerate(hosts)
    ]


def deepspeed(hosts: Sequence[Host], identity: Identity) -> list[tuple[str, ...]]:
    """Return the argv of ``deepspeed.launcher.launch`` for each host.

    It writes the devices named in ``world_info`` into CUDA_VISIBLE_DEVICES, so these are the host's own names for them,
    and -1, which hides every GPU, for ranks on the CPU.

    ``world_info`` lists every host on every host, so these plans grow with the square of the hosts; torchrun's do not.
    """
    world = {host.name: device_words(host) or [-1] * host.slots for host in hosts}
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


def master_address(hosts: Sequence[Host]) -> str:
    """Return where rank 0 is found by the others: on the loopback interface where all are on one host."""
    return hosts[0].address if len(hosts) > 1 else LOOPBACK


def device_words(host: Host) -> list[int | str]:
    """Return the CUDA_VISIBLE_DEVICES entries of the GPUs that get a rank; none where ranks compute on the CPU."""
    chosen = host.slot_ids or range(host.slots)
    words = [host.device_ids[slot] for slot in chosen if slot < len(host.device_ids)]
    return [int(word) if word.isdigit() else word for word in words]


AGENTS: dict[str, Agent] = {"torchrun": torchrun, "deepspeed": deepspeed}
"""Every value of ``backend.agent``."""
