"""The client of the engines: submits requests, yields their text as it is generated."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from launcher.config.sampling import SamplingParams
from launcher.inference.detokenizer import TextStream
from launcher.inference.engine.base import EngineRequest, GeneratedToken
from launcher.inference.server.metrics import ServerMetrics
from launcher.inference.server.protocol import BodyLimits
from launcher.inference.server.replica_pool import ReplicaPool
from launcher.inference.server.request_state import RequestState, TooLate
from launcher.inference.server.requests import choice_seed
from launcher.inference.server.responses import ApiError, failure_error, invalid
from launcher.inference.server.result_cache import CacheStatus, ResultCache, result_key
from launcher.inference.tokenizer import TextTokenizer

_QUEUE_SIZE = 64
"""Pieces that are there before their reader asks for them."""


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """Some more of a choice."""

    text: str
    tokens: tuple[GeneratedToken, ...]
    """Tokens since the last piece; their characters may be in the next one."""
    finish: str | None = None
    """Set in the last piece."""


async def stream_text(
    flight: RequestState, words: TextTokenizer, stops: Sequence[str], *, echo: bool = False
) -> AsyncGenerator[TextDelta]:
    """Yield what can be shown of a sequence; where a string ends its text, end the sequence.

    Args:
        flight: brings the tokens.
        words: the tokenizer.
        stops: strings that end the text.
        echo: whether the text begins with the prompt's, as one text: each alone may lose a space between them.

    Raises:
        Exception: why there is no result.
    """
    text = TextStream(words.decode, stops, before=flight.request.prompt if echo else ())
    before, pending, number = text.opening, [], 0
    sampling = flight.request.sampling
    quiet = sampling.min_tokens if stops else 0
    async with aclosing(flight.read()) as tokens:
        async for token in tokens:
            number += 1
            pending.append(token)
            is_last = flight.finish == "stop" and not flight.ended_by_text and number == len(flight.tokens)
            if is_last:  # it ends the text and is no part of it
                break
            shown = text.feed(token.id, may_stop=number > quiet)
            if text.stopped is not None:
                flight.stop_at(number)
                yield TextDelta(text=before + shown, tokens=tuple(pending), finish="stop")
                return
            if shown:
                yield TextDelta(text=before + shown, tokens=tuple(pending))
                before, pending = "", []
    rest = before + text.rest()
    finish = "stop" if text.stopped is not None else flight.finish
    yield TextDelta(text=rest, tokens=tuple(pending), finish=finish)


async def merge_streams(sources: Sequence[AsyncGenerator[TextDelta]]) -> AsyncGenerator[tuple[int, TextDelta]]:
    """Yield the pieces of all sources with their source's number, as they come.

    Raises:
        Exception: the first that a source raised; the others are ended.
    """
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, TextDelta | Exception | None]] = asyncio.Queue(_QUEUE_SIZE)

    async def carry(number: int, source: AsyncGenerator[TextDelta]) -> None:
        try:
            async for piece in source:
                await queue.put((number, piece))
            await queue.put((number, None))
        except Exception as trouble:  # noqa: BLE001  (raised again by whoever reads)
            await queue.put((number, trouble))

    tasks = [asyncio.create_task(carry(number, source)) for number, source in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            number, came = await queue.get()
            if isinstance(came, Exception):
                raise came
            if came is None:
                left -= 1
            else:
                yield number, came
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class ChoiceStream:
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
        service: EngineClient,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
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

    async def pieces(self) -> AsyncGenerator[TextDelta]:
        """Yield what comes of it.

        Raises:
            Exception: why there is no result.
        """
        words, stops = self._service.words, self._arguments[2]
        assert words is not None
        while True:
            try:
                async with aclosing(
                    self._within_time(stream_text(self.flight, words, stops, echo=self._echo))
                ) as pieces:
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

    async def _within_time(self, pieces: AsyncGenerator[TextDelta]) -> AsyncGenerator[TextDelta]:
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


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """How much a server takes on."""

    name: str
    """What clients call the model."""
    capacity: int
    """Sequences that engines work on at a time."""
    max_queue: int
    max_choices: int
    queue_timeout_s: float
    request_timeout_s: float


class EngineClient:
    """One served model.

    Args:
        policy: how much it takes on.
        pool: the engines.
        results: what is kept.
    """

    def __init__(self, policy: ServerLimits, *, pool: ReplicaPool, results: ResultCache) -> None:
        self.policy, self.pool, self.results = policy, pool, results
        self.numbers = ServerMetrics(pool, results)
        self.created = int(time.time())
        self.words: TextTokenizer | None = None
        """Set once the tokenizer is there."""
        self.identity = ""
        """Hash of whatever decides the answers; set with ``words``."""
        self.draining = False
        self.open_requests = 0
        """Generating requests that are not answered to their end."""
        self._numbers = itertools.count()
        self._recent: list[float] = []

    @property
    def fingerprint(self) -> str:
        """What answers call this model's state."""
        return f"fp_{self.identity[:12]}"

    def not_ready(self) -> str:
        """Return why the server cannot answer now; empty when it can."""
        if self.draining:
            return "the server is ending"
        if self.words is None or self.pool.context is None:
            phases = sorted({engine.phase for engine in self.pool.engines})
            return f"the server is starting ({', '.join(phases) or 'tokenizer'})"
        return "" if self.pool.ready else "no engine makes progress"

    def bounds(self) -> BodyLimits:
        """Return the lengths that bodies may have.

        Raises:
            ApiError: the server takes no requests now.
        """
        if self.draining:
            self.reject("draining")
            raise ApiError(503, "the server is ending", code="draining", retry_s=5, closes=True)
        if self.words is None or self.pool.context is None:
            self.reject("starting")
            raise ApiError(503, self.not_ready(), code="starting", retry_s=2)
        return BodyLimits(context=self.pool.context, prompts=self.policy.max_choices)

    def opened(self, model: str | None) -> TextTokenizer:
        """Return the words, if requests for ``model`` are taken.

        Raises:
            ApiError: it is another model, or the server takes none now.
        """
        if model is not None and model != self.policy.name:
            message = f"there is no model {model[:100]!r} here; this server has {self.policy.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        self.bounds()  # it may have begun to end while a large body was looked at
        assert self.words is not None
        return self.words

    def reject(self, reason: str) -> None:
        """Count a request that was not begun."""
        self.numbers.rejected.labels(reason).inc()

    def check_room(self, prompts: Sequence[Sequence[int]], *, choices: int, field: str) -> None:
        """Raise where there is no room for so many sequences, now or ever.

        Raises:
            ApiError: and why.
        """
        context, count = self.pool.context, len(prompts) * choices
        assert context is not None
        for prompt in prompts:
            if not prompt:
                raise invalid("has no tokens, and a sequence must begin with one", field)
            if len(prompt) >= context:
                said = f"has {len(prompt)} tokens, and the model takes at most {context} together with its answer"
                raise invalid(said, field, code="context_length_exceeded")
        if count > self.policy.max_choices:
            param = "n" if choices > 1 else field
            raise invalid(f"asks for {count} sequences at once; this server allows {self.policy.max_choices}", param)
        if self.pool.in_flight + count > self.policy.capacity + self.policy.max_queue:
            self.reject("queue_full")
            raise ApiError(429, "too many requests are waiting", code="queue_full", retry_s=self._soon())

    def choices(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        n: int,
        stops: Sequence[str],
        priority: int,
        echo: bool = False,
    ) -> list[ChoiceStream]:
        """Begin every sequence of a request: ``n`` for each prompt."""
        kinds = [replace(sampling, seed=choice_seed(sampling.seed, number)) for number in range(n)]
        return [
            ChoiceStream(self, tuple(prompt), kind, stops, priority, echo=echo) for prompt in prompts for kind in kinds
        ]

    def fly(
        self, prompt: tuple[int, ...], sampling: SamplingParams, stops: Sequence[str], priority: int
    ) -> tuple[RequestState, CacheStatus]:
        """Begin a sequence, or join an equal one, or find its result."""
        request = EngineRequest(
            id=f"s{next(self._numbers)}",
            prompt=prompt,
            sampling=sampling,
            priority=priority,
            queue_deadline_s=self.policy.queue_timeout_s,
            deadline_s=self.policy.request_timeout_s,
        )
        if not sampling.is_deterministic:
            flight, how = RequestState(request, on_end=self._ended), "bypass"
        else:
            key = result_key(self.identity, prompt, sampling, stops)
            flight, how = self.results.find(key, RequestState(request, on_end=partial(self._landed, key)))
        flight.readers += 1
        if how in ("miss", "bypass"):
            self.pool.submit(flight)
        return flight, how  # type: ignore[return-value]

    def leave(self, flight: RequestState) -> None:
        """Take that one reader less waits for a sequence; without any, its engine lets go of it."""
        flight.readers -= 1
        if not flight.readers and not flight.ended:
            flight.fail(Abandoned())

    def _landed(self, key: str, flight: RequestState) -> None:
        self.results.landed(key, flight)
        self._ended(flight)

    def _ended(self, flight: RequestState) -> None:
        self.pool.forget(flight)
        self.numbers.ended(flight)
        now = time.monotonic()
        self._recent = [at for at in self._recent[-63:] if now - at < 60.0] + [now]

    def _soon(self) -> float:
        """Return when there may be room again, by how fast sequences ended lately."""
        if len(self._recent) < 2:
            return 1.0
        rate = len(self._recent) / max(0.1, time.monotonic() - self._recent[0])
        return min(60.0, self.pool.in_flight / max(rate, 0.01) / 4)


class Abandoned(Exception):
    """Nobody waits for a sequence any more."""


def to_api_error(trouble: Exception, service: EngineClient, *, field: str) -> ApiError:
    """Return the answer for ``trouble``, and count it where nothing was begun."""
    problem = failure_error(trouble, prompt_field=field)
    if problem.code in ("queue_timeout", "unsupported_value"):
        service.reject(problem.code)
    return problem
