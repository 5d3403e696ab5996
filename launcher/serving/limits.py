"""How much a generation engine takes on at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Batching = Literal["continuous", "dynamic", "static", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Room and rhythm of an engine; fields mean what those of ``GeneratingJob`` of the same name do."""

    batching: Batching = "continuous"
    max_requests: int = 32
    kv_tokens: int | None = None
    prefill_chunk: int = 256
    prefix_cache: bool = True
    max_batch: int = 16
    max_wait_s: float = 0.1
    bucket: int = 32
    ageing_s: float = 10.0

    def rank(self, *, arrived_s: float, priority: int) -> float:
        """Return a request's place in line, the smallest first: waiting for ``ageing_s`` makes up for one priority."""
        return arrived_s / self.ageing_s - priority
