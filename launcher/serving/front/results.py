"""Results of requests that always have the same: kept within bytes and time, and computed once at a time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from launcher.serving.front.flight import Flight
from launcher.serving.values import Finish, Token

How = Literal["hit", "shared", "miss", "bypass"]
"""Kept already; on its way for somebody else; begun now and to be kept; begun now, never the same again."""

_ENTRY_BYTES, _TOKEN_BYTES, _TOP_BYTES = 512, 64, 48
"""About what CPython takes for an entry, a token, and each of a token's alternatives."""


@dataclass(frozen=True, kw_only=True)
class _Result:
    tokens: tuple[Token, ...]
    finish: Finish
    ended_by_text: bool
    size: int
    expires: float


class Results:
    """Least recently used results go first.

    Args:
        max_bytes: room; 0 keeps nothing, and shares nothing.
        ttl_s: how long a result is kept.
        now: the clock.
    """

    def __init__(self, max_bytes: int, *, ttl_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes, self._ttl_s, self._now = max_bytes, ttl_s, now
        self._kept: OrderedDict[str, _Result] = OrderedDict()
        self._flying: dict[str, Flight] = {}
        self.bytes = self.hits = self.misses = self.shared = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: str, flight: Flight) -> tuple[Flight, How]:
        """Return who brings the result of ``key``: one that is kept, one on its way, or ``flight``, to be begun.

        Args:
            key: tells apart everything that decides the result.
            flight: is filled where the result is kept; else, if nobody else flies, its result will be kept.
        """
        if not self.max_bytes:
            return flight, "bypass"
        result = self._kept.get(key)
        if result is not None and result.expires <= self._now():
            self._drop(key)
            result = None
        if result is not None:
            self._kept.move_to_end(key)
            self.hits += 1
            flight.tokens.extend(result.tokens)
            flight.finish, flight.ended_by_text = result.finish, result.ended_by_text
            return flight, "hit"
        if (other := self._flying.get(key)) is not None and not other.ended:
            self.shared += 1
            return other, "shared"
        self.misses += 1
        self._flying[key] = flight
        return flight, "miss"

    def landed(self, key: str, flight: Flight) -> None:
        """Keep what ``flight`` brought, if it brought a result."""
        if self._flying.get(key) is flight:
            del self._flying[key]
        if flight.finish in ("stop", "length"):
            self._keep(key, tuple(flight.tokens), flight.finish, ended_by_text=flight.ended_by_text)

    def _keep(self, key: str, tokens: tuple[Token, ...], finish: Finish, *, ended_by_text: bool) -> None:
        size = _ENTRY_BYTES + sum(_TOKEN_BYTES + _TOP_BYTES * len(token.top) for token in tokens)
        if size > self.max_bytes:
            return
        self._drop(key)
        expires = self._now() + self._ttl_s
        self._kept[key] = _Result(tokens=tokens, finish=finish, ended_by_text=ended_by_text, size=size, expires=expires)
        self.bytes += size
        while self.bytes > self.max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: str) -> None:
        if (result := self._kept.pop(key, None)) is not None:
            self.bytes -= result.size
