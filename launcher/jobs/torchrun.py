"""torchrun for a run on one machine: its store listens on the loopback interface only.

``python -m launcher.jobs.torchrun``, started by the agent of the host. It takes torchrun's own
arguments. Of its rendezvous backends only ``static`` is changed.
"""

from __future__ import annotations

from torch.distributed import Store, run
from torch.distributed.elastic.rendezvous import RendezvousInfo, static_tcp_rendezvous

from launcher.engines.loopback_store import serve_store


class LoopbackRendezvous(static_tcp_rendezvous.StaticTCPRendezvous):  # type: ignore[misc]
    """The static rendezvous, with a store that other machines cannot reach."""

    _store: Store | None

    def next_rendezvous(self) -> RendezvousInfo:
        """Serve the store, once."""
        if self._store is None:
            self._store = serve_store(self.master_port, world_size=self.world_size, timeout=self.timeout)
        return super().next_rendezvous()


def main() -> None:
    """Start the ranks that the command line describes and stay until they end."""
    static_tcp_rendezvous.StaticTCPRendezvous = LoopbackRendezvous  # torchrun has no option for it
    run.main()


if __name__ == "__main__":
    main()
