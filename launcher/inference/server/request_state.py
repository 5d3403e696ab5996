"""The state of one request in the server: its tokens, its times and its readers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

from launcher.inference.engine.base import EngineOutput, EngineRequest, FinishReason, GeneratedToken, InvalidRequest

_TOKENS_PER_TURN = 16
"""Tokens that are decoded before other requests have their turn."""


class GenerationFailed(Exception):
    """The engine failed; the message is for the client."""

    reason = "error"


class DeadlineExceeded(Exception):
    """A deadline has passed: that of the queue (``while_queued``) or that of the whole request."""

    reason = "timeout"

    def __init__(self, *, while_queued: bool) -> None:
        super().__init__("waited too long" if while_queued else "took too long")
        self.while_queued = while_queued


class ServerDraining(Exception):
    """The server shuts down before there is a result."""

    reason = "draining"


@dataclass(frozen=True, kw_only=True)
class RequestTimes:
    """When things happened, by ``time.monotonic()``; ``None`` where they did not."""

    arrived: float
    started: float | None = None
    """First output of the engine."""
    first_token: float | None = None
    """First token."""
    ended: float | None = None


class RequestState:
    """A sequence in generation, which several clients may read.

    Args:
        request: its id stays the same when another engine takes over.
        on_end: called once, at its end.
    """

    def __init__(self, request: EngineRequest, *, on_end: Callable[[RequestState], None] = lambda state: None) -> None:
        self.request = request
        self.tokens: list[GeneratedToken] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.num_cached_tokens = 0
        self.times = RequestTimes(arrived=time.monotonic())
        self.num_attempts = 0
        """How often it was submitted to an engine."""
        self.num_readers = 0
        self.ended_by_stop_string = False
        """Whether a stop string ended it, in its last token; otherwise the last token is no text."""
        self.itl_s: list[float] = []
        """Inter-token latencies, in seconds."""
        self._last_at = 0.0
        self._on_end = on_end
        self._replayed: list[GeneratedToken] = []
        """Tokens of an engine that was lost: the next one must generate the same."""
        self._changed = asyncio.Event()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, with a result or an error."""
        return self.finish_reason is not None or self.error is not None

    @property
    def error_reason(self) -> str:
        """Label of its error in metrics."""
        return str(getattr(self.error, "reason", "error"))

    @property
    def has_no_tokens(self) -> bool:
        """Whether no token was generated yet."""
        return not self.tokens

    def handle_output(self, output: EngineOutput) -> None:
        """Handle one output of the engine."""
        if self.is_done:
            return
        now = time.monotonic()
        if self.times.started is None:
            self.times = replace(self.times, started=now)
            self.num_cached_tokens = output.num_cached_tokens
        if output.tokens:
            if self.times.first_token is None:
                self.times = replace(self.times, first_token=now)
            else:
                self.itl_s.append(now - self._last_at)
            self._last_at = now
        if not self._matches_replay(output.tokens):
            self.fail(GenerationFailed("an engine was lost, and the next one generated other tokens"))
            return
        match output.finish_reason:
            case "error" if output.param:
                self.reject(output.param, output.error)
            case "error":
                self.fail(GenerationFailed(output.error or "the engine failed"))
            case "timeout":
                self.fail(DeadlineExceeded(while_queued=self.has_no_tokens))
            case "cancelled":
                self.fail(GenerationFailed("the engine cancelled it"))
            case "stop" | "length":
                self._end(output.finish_reason)
            case None:
                self._wake()

    def stop_at(self, length: int) -> None:
        """End it after so many tokens: a reader found a stop string."""
        if not self.is_done:
            del self.tokens[length:]
            self.ended_by_stop_string = True
            self._end("stop")

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        if not self.is_done:
            self.error = error
            self.times = replace(self.times, ended=time.monotonic())
            self._on_end(self)
            self._wake()

    def reject(self, param: str, why: str) -> None:
        """End it because no engine can serve it."""
        self.fail(InvalidRequest(param, why))

    def replay(self) -> None:
        """Prepare for another engine: it generates the known tokens again, and they are compared."""
        self._replayed = list(self.tokens)

    async def read(self) -> AsyncGenerator[GeneratedToken]:
        """Yield every token from the first on, as they are generated.

        Raises:
            Exception: the error that ended it.
        """
        at = 0
        while True:
            if at < len(self.tokens):
                yield self.tokens[at]
                at += 1
                if at % _TOKENS_PER_TURN == 0:  # a cached result, or one of beam search: others have their turn
                    await asyncio.sleep(0)
            elif self.error is not None:
                raise self.error
            elif self.finish_reason is not None:
                return
            else:
                await self._changed.wait()

    def _matches_replay(self, tokens: tuple[GeneratedToken, ...]) -> bool:
        """Add tokens; return False where they differ from those that are replayed."""
        for token in tokens:
            if self._replayed:
                if self._replayed.pop(0).id != token.id:
                    return False
            else:
                self.tokens.append(token)
        return True

    def _end(self, finish_reason: FinishReason) -> None:
        self.finish_reason = finish_reason
        self.times = replace(self.times, ended=time.monotonic())
        self._on_end(self)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
