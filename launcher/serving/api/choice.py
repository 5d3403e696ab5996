"""One choice of an answer: a sequence that its request waits for, alone or together with others that ask the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from launcher.serving.api.sequence import Piece, pieces_of
from launcher.serving.front.flight import TooLate
from launcher.serving.values import Sampling

if TYPE_CHECKING:
    from launcher.serving.api.service import Service


class Choice:
    """One sequence of a request, from its beginning to its end.

    Args:
        service: where it comes from.
        prompt: tokens to continue.
        sampling: how.
        stops: strings that end it.
        priority: higher is sooner.
        echo: whether its text begins with the prompt's.
    """

    def __init__(
        self,
        service: Service,
        prompt: tuple[int, ...],
        sampling: Sampling,
        stops: Sequence[str],
        priority: int,
        *,
        echo: bool = False,
    ) -> None:
        self._echo = echo
        self._service, self._arguments = service, (prompt, sampling, stops, priority)
        self._began = time.monotonic()
        self.flight, self.how = service.fly(*self._arguments)
        self.num_tokens = 0
        self._is_left = False

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Yield what comes of it.

        Raises:
            Exception: why there is no result.
        """
        words, stops = self._service.words, self._arguments[2]
        assert words is not None
        while True:
            try:
                async with aclosing(self._within_time(pieces_of(self.flight, words, stops, echo=self._echo))) as pieces:
                    async for piece in pieces:
                        self.num_tokens += len(piece.tokens)
                        yield piece
            except TooLate:
                if self.how != "shared" or self.num_tokens or self._left_s() <= 0:
                    raise
                self._service.leave(self.flight)  # the other one came earlier: its time was up, not ours
                self.flight, self.how = self._service.fly(*self._arguments)
            else:
                return

    def leave(self) -> None:
        """Wait no longer for it; call it whatever has happened."""
        if not self._is_left:
            self._is_left = True
            if self.how in ("hit", "shared"):
                self._service.numbers.answered(self.flight)
            self._service.leave(self.flight)

    async def _within_time(self, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
        """Yield the same; end it where an engine does not keep the deadline itself."""
        async with aclosing(pieces):
            while True:
                try:
                    async with asyncio.timeout(max(0.0, self._left_s()) + 1.0):
                        piece = await anext(pieces)
                except TimeoutError:
                    raise TooLate(while_queued=False) from None
                except StopAsyncIteration:
                    return
                yield piece

    def _left_s(self) -> float:
        return self._service.policy.request_timeout_s - (time.monotonic() - self._began)
