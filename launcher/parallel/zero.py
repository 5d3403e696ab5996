"""ZeRO: optimiser state, gradients and parameters partitioned over the data-parallel ranks, by DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from launcher.errors import ConfigError
from launcher.parallel.base import Parallel

Place = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True, kw_only=True)
class Zero(Parallel):
    """ZeRO (Rajbhandari et al., 2020, arXiv:1910.02054) with offload (2101.06840) and Infinity (2104.07857)."""

    kind: ClassVar[str] = "zero"
    engine: ClassVar[Literal["torch", "deepspeed"]] = "deepspeed"

    stage: Literal[0, 1, 2, 3] = 3
    """What is partitioned: 0 nothing, 1 optimiser state, 2 gradients too, 3 parameters too."""

    offload_optimizer: Place = "none"
    """Where optimiser state lives; ``cpu`` from stage 1, ``nvme`` at stage 3."""

    offload_parameters: Place = "none"
    """Where partitioned parameters live; stage 3 only."""

    nvme_path: str | None = None
    """Folder on a fast local disk; needed as soon as anything is offloaded to NVMe."""

    pin_memory: bool = True
    """Page-locked host buffers: faster copies to a GPU. Without one they only cost memory, and the run says so."""

    overlap_comm: bool = True
    """Reduce gradients while the backward pass goes on."""

    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they come, against fragmentation."""

    reduce_bucket_size: int = 500_000_000
    """Elements reduced at a time."""

    allgather_bucket_size: int = 500_000_000
    """Elements gathered at a time (stages 1 and 2)."""

    prefetch_bucket_size: int = 50_000_000
    """Elements of parameters fetched ahead (stage 3)."""

    persistence_threshold: int = 100_000
    """Parameters with fewer elements are never partitioned (stage 3)."""

    max_live_parameters: int = 1_000_000_000
    """Elements of parameters resident at once before some are released (stage 3)."""

    sub_group_size: int = 1_000_000_000
    """Elements the optimiser updates at a time (stage 3): smaller needs less memory beside NVMe."""

    nvme_buffer_size: int = 100_000_000
    """Elements of one staging buffer for parameters on NVMe; at least the largest parameter."""

    nvme_buffer_count: int = 5
    """Staging buffers."""

    low_memory_bf16: bool = False
    """Keep master weights, gradients and Adam moments in bf16 too: a third of the memory, coarser updates."""

    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed keys, checked against DeepSpeed's own; they may not contradict a field of ours."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse offload where the stage has none."""
        yield from ()
