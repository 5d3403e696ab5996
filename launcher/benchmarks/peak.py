"""How much memory a stretch of work takes at most, beyond what was there before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from launcher.models.heap import give_back

if TYPE_CHECKING:
    import torch

_RESET_HIGH_WATER_MARK = "5"
"""What ``/proc/<pid>/clear_refs`` takes to start VmHWM anew: proc(5)."""


class PeakMemory:
    """Counts from the moment it is made: the allocator's peak on a GPU, the resident high-water mark on a CPU.

    On a CPU memory that was freed but is still held by the C library is given back first, or it would hide the growth.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            self.before = int(torch.cuda.memory_allocated(device))
        else:
            give_back()
            Path("/proc/self/clear_refs").write_text(_RESET_HIGH_WATER_MARK, encoding="ascii")
            self.before = high_water_mark()

    def above_before(self) -> int:
        """Return the bytes of the peak since then, above the level at that time (``before``)."""
        if self._device.type == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self._device)) - self.before
        return high_water_mark() - self.before


def high_water_mark() -> int:
    """Return the most bytes of RAM this process has held since the mark was last reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024
