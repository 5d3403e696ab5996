"""torch's TCP store on the loopback interface only.

torch's own TCPStore listens on every interface of the machine, and any client can read and write its keys.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from torch import distributed as dist

from launcher.utils.system import LOOPBACK


def serve_store(port: int, *, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Return a store that this process serves on the loopback interface.

    Raises:
        OSError: the port is taken.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(socket.SOMAXCONN)
        descriptor = listener.detach()  # the store closes it
    return dist.TCPStore(
        LOOPBACK, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=descriptor
    )


def join_store(*, rank: int, world_size: int, timeout: timedelta) -> dist.TCPStore | None:
    """Return the store of a run on one machine, which rank 0 serves.

    ``None`` where torch finds it automatically: torchrun's agent serves it, or the ranks are on several machines.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or os.environ.get("MASTER_ADDR") != LOOPBACK:
        return None
    port = int(os.environ["MASTER_PORT"])
    if rank == 0:
        return serve_store(port, world_size=world_size, timeout=timeout)
    return dist.TCPStore(LOOPBACK, port, world_size, is_master=False, timeout=timeout)
