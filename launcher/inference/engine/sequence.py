"""A request while the engine works on it: a group of sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.block_manager import NO_PREFIX, PrefixHash


@dataclass(eq=False, slots=True)
class Sequence:
    """One sequence that grows."""

    task: SequenceGroup
    tokens: list[int]
    """Prompt and output."""
    computed: int = 0
    """How many of them have keys and values."""
    pages: list[int] = field(default_factory=list)
    noted: PrefixHash = NO_PREFIX

    @property
    def pending(self) -> int:
        """Tokens without keys and values."""
        return len(self.tokens) - self.computed


@dataclass(eq=False, slots=True)
class SequenceGroup:
    """A request and its sequences: one, or as many as beam search has kept."""

    request: EngineRequest
    arrived_s: float
    rows: list[Sequence] = field(default_factory=list)
    begun: bool = False
    """Whether it has ever left the queue."""
    cached_tokens: int = 0
    told: bool = False
    """Whether an update has gone out."""

    def __post_init__(self) -> None:
        self.rows = [Sequence(self, list(self.request.prompt))]

    @property
    def priority(self) -> int:
        """Of the request."""
        return self.request.priority

    @property
    def width(self) -> int:
        """Sequences that it may come to have."""
        return self.request.sampling.num_beams
