"""A request while the engine works on it: a group of sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.block_manager import NO_PREFIX, PrefixHash, empty_prefix


@dataclass(eq=False, slots=True)
class Sequence:
    """One sequence that grows."""

    group: SequenceGroup
    tokens: list[int]
    """Prompt and output."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    block_table: list[int] = field(default_factory=list)
    """Blocks that hold them, in order."""
    prefix: PrefixHash = NO_PREFIX
    """Prefix of its blocks that is registered for sharing."""

    @property
    def num_uncomputed(self) -> int:
        """Tokens without keys and values."""
        return len(self.tokens) - self.num_computed


@dataclass(eq=False, slots=True)
class SequenceGroup:
    """A request and its sequences: one, or as many as beam search keeps."""

    request: EngineRequest
    arrived_s: float
    sequences: list[Sequence] = field(default_factory=list)
    is_started: bool = False
    """Whether it has ever left the queue."""
    num_cached_tokens: int = 0
    """Prompt tokens that were in the cache when it started."""
    is_reported: bool = False
    """Whether an output of it was returned."""
    adapter: int = 0
    """Number of its adapter in the engine, from 1; 0 is the base model."""

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, list(self.request.prompt), prefix=self.empty_prefix)]

    @property
    def empty_prefix(self) -> PrefixHash:
        """Prefix of its sequences before any of their blocks is registered for sharing."""
        return empty_prefix(self.adapter)

    @property
    def priority(self) -> int:
        """Priority of the request."""
        return self.request.priority

    @property
    def max_num_seqs(self) -> int:
        """Most sequences that it may have."""
        return self.request.sampling.num_beams
