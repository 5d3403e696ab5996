"""One rank that talks to itself, by NCCL on a GPU and Gloo on a CPU; started by gpu_check."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist


def main() -> None:
    """Reduce, gather and broadcast."""
    on_gpu = sys.argv[1] == "cuda"
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, device_id=device if on_gpu else None)
    given = torch.arange(1024, dtype=torch.float32, device=device)
    summed, gathered = given.clone(), [torch.zeros_like(given)]
    dist.all_reduce(summed)
    dist.all_gather(gathered, given)
    dist.broadcast(given, src=0)
    dist.barrier()
    assert torch.equal(summed, given), "a sum over one rank is what went in"
    assert torch.equal(gathered[0], given), "what one rank gathers is its own"
    dist.destroy_process_group()
    version = ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else ""
    print(f"{backend} {version}".strip() + ": all_reduce, all_gather and broadcast give back what went in")


if __name__ == "__main__":
    main()
