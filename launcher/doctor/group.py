"""A process group of some hosts that measures itself. Imports torch, so only the collective's process may use it."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

_SMALL, _MIDDLE, _LARGE = 64 * 2**10, 2**20, 16 * 2**20
_DISTANT_S = 0.05
"""A link with this latency is measured with little data."""
_SLOW_S = 0.05
"""A mebibyte that takes longer says enough about bandwidth."""
_BUSY_S = 0.005
"""An all-reduce of 8 bytes that takes longer is repeated less often."""


class Group:
    """A process group of some hosts, which measures itself."""

    def __init__(self, store: Any, *, rank: int, size: int, uses_gpus: bool, timeout_s: float) -> None:
        import torch
        from torch import distributed as dist

        timeout = timedelta(seconds=timeout_s)
        self._device = torch.device("cuda", 0) if uses_gpus else torch.device("cpu")
        if uses_gpus:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout  # noqa: SLF001 (as torch's own init_process_group does)
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, size, timeout)

    def latency_s(self) -> float:
        """Return the fastest all-reduce of 8 bytes."""
        self._time(8)  # connects
        repeats = 20 if self._time(8) < _BUSY_S else 2
        return min(self._time(8) for _ in range(repeats))

    def bytes_per_s(self, *, latency_s: float) -> float:
        """Return size over time of a large all-reduce, or of one as large as a slow link allows."""
        if latency_s > _DISTANT_S:
            return _SMALL / self._time(_SMALL)
        taken = min(self._time(_MIDDLE) for _ in range(2))
        return _MIDDLE / taken if taken > _SLOW_S else _LARGE / min(self._time(_LARGE) for _ in range(3))

    def _time(self, num_bytes: int) -> float:
        """Return the time of one all-reduce: the longest that any member saw, so that all decide alike what follows."""
        import torch

        values = torch.zeros(num_bytes // 4, dtype=torch.float32, device=self._device)
        started = time.monotonic()
        self._reduce(values, largest=False)
        taken = torch.tensor([time.monotonic() - started], dtype=torch.float32, device=self._device)
        self._reduce(taken, largest=True)
        return float(taken.item())

    def _reduce(self, values: Any, *, largest: bool) -> None:
        import torch
        from torch import distributed as dist

        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        self._group.allreduce([values], options).wait()
        if values.is_cuda:
            torch.cuda.synchronize()
