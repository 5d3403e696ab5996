"""Peak memory of one rank."""

from __future__ import annotations

import resource
import sys


def peak_bytes(*, cuda: bool) -> int:
    """Return the most device memory allocated so far, or the process's resident high-water mark on a CPU."""
    if cuda:
        import torch

        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes
