"""Time by phase of a step, peak memory, and the peak FLOP/s of GPUs."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from launcher.profiling.profiler import NO_PROFILER, Profiler

if TYPE_CHECKING:
    from launcher.protocol.heartbeat import Heartbeat


class StepClock:
    """Times the phases of a step and tells the heartbeat which one begins.

    On a GPU kernels run behind the host, so each phase is bracketed by CUDA events and read once, at the end of the
    step, after the loss has been fetched: timing adds no synchronisation of its own.

    Args:
        heartbeat: called with the phase that begins.
        cuda: whether there is a GPU to wait for.
        profiler: finds the phases by name in its trace.
    """

    def __init__(self, heartbeat: Heartbeat, *, cuda: bool, profiler: Profiler = NO_PROFILER) -> None:
        self._heartbeat, self._cuda, self._profiler = heartbeat, cuda, profiler
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, object, object]] = []
        self.step = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block as part of ``name``; the same name may come several times in a step."""
        self._heartbeat.update(name, self.step)
        with self._profiler.mark(name), self._between_events(name) if self._cuda else self._on_host(name):
            yield

    @contextmanager
    def _on_host(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    @contextmanager
    def _between_events(self, name: str) -> Iterator[None]:
        import torch

        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        try:
            yield
        finally:
            after.record()
            self._events.append((name, before, after))

    def pop_times(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call."""
        for name, before, after in self._events:
            after.synchronize()  # type: ignore[attr-defined]
            self._seconds[name] += before.elapsed_time(after) / 1000  # type: ignore[attr-defined]
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds


def peak_memory_bytes(*, cuda: bool) -> int:
    """Return the peak bytes: allocated by torch on a GPU, resident in RAM on a CPU."""
    if cuda:
        import torch

        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


PEAK_TFLOPS: Final = {
    # Dense peak without sparsity, from the vendors' data sheets: 16-bit, fp32 with TF32 off, TF32, 8-bit.
    "H200": (989.0, 67.0, 494.7, 1979.0),
    "H100 PCIe": (756.0, 51.0, 378.0, 1513.0),
    "H100": (989.0, 67.0, 494.7, 1979.0),
    "A100": (312.0, 19.5, 156.0, None),
    "L40S": (362.0, 91.6, 183.0, 733.0),
    "L4": (121.0, 30.3, 60.0, 242.5),
    "A10": (125.0, 31.2, 62.5, None),
    "V100": (125.0, 15.7, None, None),
    "T4": (65.0, 8.1, None, None),
    "RTX 4090": (165.2, 82.6, 82.6, 330.3),
    "RTX 3090": (71.0, 35.6, 35.6, None),
}
"""Peak TFLOP/s by a part of the device's name, first match; ``None`` without the format."""

_COLUMNS: Final = {"bf16": 0, "fp16": 0, "fp32": 1, "tf32": 2, "fp8": 3}


def peak_flops(device_name: str, *, precision: str) -> float | None:
    """Return a GPU's stated peak FLOP/s; ``None`` if it, or the format, is not in the table.

    A CPU has none: what a probe measures depends on what else runs, and shares of it have been over 100%.

    Args:
        device_name: the GPU's name.
        precision: the option of the group; under fp8 the share of the products that stay in 16 bits is not counted.
    """
    for part, peaks in PEAK_TFLOPS.items():
        if part in device_name:
            peak = peaks[_COLUMNS[precision]]
            return None if peak is None else 1e12 * peak
    return None
