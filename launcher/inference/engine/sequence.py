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

    def content(self, count: int) -> list[int]:
        """Return what identifies its first ``count`` tokens for sharing.

        Images are compared by their content.
        """
        own = self.group.prompt_content
        return [*own[:count], *self.tokens[len(own) : count]] if own else self.tokens[:count]


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
    images: int = 0
    """Number of its images in the engine, from 1; 0 is none."""
    prompt_content: list[int] = field(default_factory=list)
    """Its prompt with :func:`image_content` in the place of image tokens; empty without images."""

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


_ROW_BITS = 32


def image_content(request: EngineRequest, *, image_token: int) -> list[int]:
    """Return the prompt of a request, with a negative number for each of its image tokens.

    The number says which image it is, and which of its tokens: all images have the same token, and keys and values
    differ with what it stands for.
    """
    rows = (
        -1 - (int(image.content, 16) << _ROW_BITS | row) for image in request.images for row in range(image.num_tokens)
    )
    return [next(rows) if token == image_token else token for token in request.prompt]
