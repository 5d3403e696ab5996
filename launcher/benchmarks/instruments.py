"""Peak memory, and random tokens as micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from launcher.data.dataloader import MicroBatch
from launcher.utils.heap import trim_heap

if TYPE_CHECKING:
    from launcher.engines.context import Context


_RESET_HIGH_WATER_MARK = "5"
"""Value for ``/proc/<pid>/clear_refs`` that resets VmHWM: proc(5)."""


class PeakMemory:
    """Peak memory since creation: the allocator's on a GPU, the resident set's on a CPU.

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
            trim_heap()
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


def random_batches(context: Context) -> list[MicroBatch]:
    """Return this rank's micro-batches of one step, with token ids drawn from the seed.

    Ids are below the model's vocabulary size.
    """
    run, batch = context.run, context.batch
    shape, length = run.model.shape(), run.batched_job.sequence_length
    assert shape is not None, "refused before anything starts"
    generator = torch.Generator().manual_seed((run.job.seed * 1009 + context.data_rank) % 2**63)
    drawn = torch.randint(
        shape.vocab_size, (batch.gradient_accumulation_steps, batch.micro_batch, length + 1), generator=generator
    )
    return [MicroBatch(input_ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous()) for ids in drawn]


def tensor_bytes(gradient: Tensor | None) -> Tensor:
    """Return a gradient on the CPU."""
    assert gradient is not None, "every parameter of the encoder takes part"
    return gradient.cpu().contiguous()


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the bytes of fp32 tensors, in this order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
