"""Blocks of the KV cache: allocation, reference counts, and prefixes shared by their tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

BLOCK_SIZE = 32
"""Tokens in a block.
Only full blocks are shared: smaller blocks share more, larger ones are faster to iterate over."""
TRANSFORMERS_BLOCK_SIZE = 256
"""The same under ``engine=transformers``, as that library has it by default."""

_Key = tuple[int, tuple[int, ...]]


class PrefixHash(NamedTuple):
    """Number of a sequence's blocks registered for sharing, and the last one's content id."""

    num_blocks: int = 0
    content_id: int = 0


def empty_prefix(adapter: int) -> PrefixHash:
    """Return the prefix without blocks of sequences of an adapter; 0 is the base model.

    Keys and values depend on the adapter, so sequences share blocks with those of the same adapter only.
    """
    return PrefixHash(0, -adapter)


NO_PREFIX = empty_prefix(0)


class BlockManager:
    """Allocates blocks, counts references to each, and registers full ones for sharing.

    A block without references keeps its content until it is needed; the least recently used one is evicted first.
    Content is identified by the tokens of a block and the block before it, compared token by token, not by a hash.

    Args:
        num_blocks: of the KV cache.
        share: whether full blocks are registered for sharing.
    """

    def __init__(self, num_blocks: int, *, share: bool) -> None:
        self._share = share
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._cached: dict[_Key, int] = {}
        self._key: dict[int, _Key] = {}
        self._content_id: dict[int, int] = {}
        self._next_content_id = 1
        self.num_blocks = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Blocks with references."""
        return self.num_blocks - self.num_free

    def allocate(self, num: int) -> list[int] | None:
        """Return ``num`` blocks with one reference each, or ``None`` where fewer are free."""
        if num > self.num_free:
            return None
        allocated = []
        for _ in range(num):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._evictable.popitem(last=False)
                self._evict(block)
            self._ref_counts[block] = 1
            allocated.append(block)
        return allocated

    def acquire(self, blocks: Sequence[int]) -> None:
        """Add a reference to each block."""
        for block in blocks:
            if not self._ref_counts[block]:
                del self._evictable[block]
            self._ref_counts[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block; the last blocks of a sequence are evicted first."""
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if block in self._key:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def is_shared(self, block: int) -> bool:
        """Whether writing into a block would change what other sequences read."""
        return self._ref_counts[block] > 1 or block in self._key

    def match_prefix(self, tokens: Sequence[int], *, prefix: PrefixHash = NO_PREFIX) -> list[int]:
        """Return the cached blocks of the longest prefix of ``tokens``, without the last token.

        Args:
            tokens: of the sequence.
            prefix: the empty one of its adapter.
        """
        found: list[int] = []
        previous = prefix.content_id
        if not self._share:
            return found
        for start in range(0, len(tokens) - BLOCK_SIZE, BLOCK_SIZE):
            block = self._cached.get((previous, tuple(tokens[start : start + BLOCK_SIZE])))
            if block is None:
                break
            found.append(block)
            previous = self._content_id[block]
        return found

    def cache_full_blocks(self, tokens: Sequence[int], blocks: Sequence[int], *, prefix: PrefixHash) -> PrefixHash:
        """Register full blocks of a sequence for sharing.

        Args:
            tokens: of the sequence, as far as their keys and values are computed.
            blocks: of the sequence.
            prefix: what the last call for this sequence returned.

        Returns:
            The prefix that is registered now.
        """
        if not self._share:
            return prefix
        previous = prefix.content_id
        for index in range(prefix.num_blocks, len(tokens) // BLOCK_SIZE):
            key = (previous, tuple(tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]))
            block = self._cached.get(key)
            if block is None:
                block = blocks[index]
                self._cached[key], self._key[block], self._content_id[block] = block, key, self._next_content_id
                self._next_content_id += 1
            previous = self._content_id[
                block
            ]  # of an equal block, if there is one, so that both sequences match the same blocks
        return PrefixHash(max(prefix.num_blocks, len(tokens) // BLOCK_SIZE), previous)

    def _evict(self, block: int) -> None:
        del self._cached[self._key.pop(block)]
        del self._content_id[block]
