"""Blocks of the KV cache: allocation, reference counts, and prefixes shared by their tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

BLOCK_SIZE = 32
"""Tokens in a page. Only full pages are shared: smaller ones share more, larger ones are quicker to go through."""
TRANSFORMERS_BLOCK_SIZE = 256
"""The same under ``engine=transformers``, as that library has it by default."""

_Key = tuple[int, tuple[int, ...]]


class PrefixHash(NamedTuple):
    """How many pages of a sequence are remembered, and the mark of the last of them."""

    pages: int = 0
    mark: int = 0


NO_PREFIX = PrefixHash()


class BlockManager:
    """Hands pages out, counts who holds each, and remembers what full ones hold.

    A page that nobody holds keeps what is in it until the room is needed; the one unused for longest goes first. What a
    page holds is known by its own tokens and the page before it, compared token by token: a hit is never a guess.

    Args:
        count: pages that there are.
        share: whether full pages are remembered.
    """

    def __init__(self, count: int, *, share: bool) -> None:
        self._share = share
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._known: dict[_Key, int] = {}
        self._key: dict[int, _Key] = {}
        self._mark: dict[int, int] = {}
        self._next_mark = 1
        self.count = count

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that somebody holds."""
        return self.count - self.available

    def take(self, num: int) -> list[int] | None:
        """Return ``num`` pages, each held once, or ``None`` where there are not as many."""
        if num > self.available:
            return None
        taken = []
        for _ in range(num):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                self._forget(page)
            self._holders[page] = 1
            taken.append(page)
        return taken

    def hold(self, pages: Sequence[int]) -> None:
        """Count one more holder of each."""
        for page in pages:
            if not self._holders[page]:
                del self._idle[page]
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Count one holder less of each; last pages of a sequence are the first to be taken again."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._key:
                self._idle[page] = None
            else:
                self._free.append(page)

    def shared(self, page: int) -> bool:
        """Whether writing into it would change what others read."""
        return self._holders[page] > 1 or page in self._key

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Return the full pages that hold the beginning of ``tokens``; never all of it: one is left to compute."""
        found: list[int] = []
        before = 0
        if not self._share:
            return found
        for start in range(0, len(tokens) - BLOCK_SIZE, BLOCK_SIZE):
            page = self._known.get((before, tuple(tokens[start : start + BLOCK_SIZE])))
            if page is None:
                break
            found.append(page)
            before = self._mark[page]
        return found

    def remember(self, tokens: Sequence[int], pages: Sequence[int], *, noted: PrefixHash) -> PrefixHash:
        """Note what full pages hold.

        Args:
            tokens: of a sequence, those alone whose keys and values are there.
            pages: of it.
            noted: what this returned for the sequence before.

        Returns:
            How far it has come.
        """
        if not self._share:
            return noted
        before = noted.mark
        for index in range(noted.pages, len(tokens) // BLOCK_SIZE):
            key = (before, tuple(tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]))
            page = self._known.get(key)
            if page is None:
                page = pages[index]
                self._known[key], self._key[page], self._mark[page] = page, key, self._next_mark
                self._next_mark += 1
            before = self._mark[page]  # where another page holds the same, what follows is found behind that one
        return PrefixHash(max(noted.pages, len(tokens) // BLOCK_SIZE), before)

    def _forget(self, page: int) -> None:
        del self._known[self._key.pop(page)]
        del self._mark[page]
