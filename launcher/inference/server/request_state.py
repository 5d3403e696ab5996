"""The state of one request in the server: what the engine sent, and who waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

from launcher.inference.engine.base import EngineOutput, EngineRequest, FinishReason, GeneratedToken, Refused

_TOKENS_PER_TURN = 16
"""Tokens that are made text of before other requests go on."""


class Failed(Exception):
    """A sequence that got no result; the message is for who asked.

    Attributes:
        is_ours: whether the server is at fault.
    """

    def __init__(self, why: str, *, is_ours: bool = True) -> None:
        super().__init__(why)
        self.is_ours = is_ours


class TooLate(Exception):
    """A deadline has passed; ``while_queued`` tells which."""

    def __init__(self, *, while_queued: bool) -> None:
        super().__init__("waited too long" if while_queued else "took too long")
        self.while_queued = while_queued


class Draining(Exception):
    """The server ends before there is a result."""


@dataclass(frozen=True, kw_only=True)
class RequestTimes:
    """When things happened, by ``time.monotonic()``; ``None`` where they did not."""

    arrived: float
    begun: float | None = None
    """The engine's first word of it."""
    first: float | None = None
    """Its first token."""
    ended: float | None = None


class RequestState:
    """A request that may be answered to several who ask the same.

    Args:
        request: what is asked; its id is this flight's for good, whatever engine it is on.
        on_end: called once, when there is nothing more to come.
    """

    def __init__(self, request: EngineRequest, *, on_end: Callable[[RequestState], None] = lambda flight: None) -> None:
        self.request = request
        self.tokens: list[GeneratedToken] = []
        self.finish: FinishReason | None = None
        self.trouble: Exception | None = None
        self.cached_tokens = 0
        self.times = RequestTimes(arrived=time.monotonic())
        self.lives = 0
        """How often it was given to an engine."""
        self.readers = 0
        self.ended_by_text = False
        """Whether a string ended it, in its last token; else what ended it is a token that is no text."""
        self.gaps_s: list[float] = []
        """Between one word of tokens and the next."""
        self._last_at = 0.0
        self._on_end = on_end
        self._to_repeat: list[GeneratedToken] = []
        """What an engine that died had said: the next one must say the same."""
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.finish is not None or self.trouble is not None

    @property
    def is_untouched(self) -> bool:
        """Whether no token of it is known."""
        return not self.tokens

    def hear(self, update: EngineOutput) -> None:
        """Take what an engine says."""
        if self.ended:
            return
        now = time.monotonic()
        if self.times.begun is None:
            self.times = replace(self.times, begun=now)
            self.cached_tokens = update.cached_tokens
        if update.tokens:
            if self.times.first is None:
                self.times = replace(self.times, first=now)
            else:
                self.gaps_s.append(now - self._last_at)
            self._last_at = now
        if not self._repeats(update.tokens):
            self.fail(Failed("an engine was lost, and the next one continued otherwise"))
            return
        match update.finish:
            case "error" if update.field:
                self.reject(update.field, update.problem)
            case "error":
                self.fail(Failed(update.problem or "the engine failed"))
            case "timeout":
                self.fail(TooLate(while_queued=self.is_untouched))
            case "cancelled":
                self.fail(Failed("the engine let go of it"))
            case "stop" | "length":
                self._end(update.finish)
            case None:
                self._wake()

    def stop_at(self, length: int) -> None:
        """End it after so many tokens: a reader has found what ends its text."""
        if not self.ended:
            del self.tokens[length:]
            self.ended_by_text = True
            self._end("stop")

    def fail(self, trouble: Exception) -> None:
        """End it without a result."""
        if not self.ended:
            self.trouble = trouble
            self.times = replace(self.times, ended=time.monotonic())
            self._on_end(self)
            self._wake()

    def reject(self, field: str, why: str) -> None:
        """End it because no engine can ever do it."""
        self.fail(Refused(field, why))

    def start_over(self) -> None:
        """Go to another engine: what is known already is heard again first, and compared."""
        self._to_repeat = list(self.tokens)

    async def read(self) -> AsyncGenerator[GeneratedToken]:
        """Yield every token from the first on, as they come.

        Raises:
            Exception: why there is no result.
        """
        at = 0
        while True:
            if at < len(self.tokens):
                yield self.tokens[at]
                at += 1
                if at % _TOKENS_PER_TURN == 0:  # a result that was kept, or came all at once: others have their turn
                    await asyncio.sleep(0)
            elif self.trouble is not None:
                raise self.trouble
            elif self.finish is not None:
                return
            else:
                await self._changed.wait()

    def _repeats(self, tokens: tuple[GeneratedToken, ...]) -> bool:
        """Take tokens; return False where they should repeat others and do not."""
        for token in tokens:
            if self._to_repeat:
                if self._to_repeat.pop(0).id != token.id:
                    return False
            else:
                self.tokens.append(token)
        return True

    def _end(self, finish: FinishReason) -> None:
        self.finish = finish
        self.times = replace(self.times, ended=time.monotonic())
        self._on_end(self)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
