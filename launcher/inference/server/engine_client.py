"""The client of the engines: submits requests, yields their text as it is generated."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial

from launcher.config.sampling import SamplingParams
from launcher.inference.detokenizer import TextStream
from launcher.inference.engine.base import EngineRequest, GeneratedToken, RequestImage
from launcher.inference.server.image_pool import ImagePool, PreparedImage, RefusedImage
from launcher.inference.server.metrics import ServerMetrics
from launcher.inference.server.middleware import CallerShares
from launcher.inference.server.protocol import BodyLimits, ChatMessage
from launcher.inference.server.replica_pool import ReplicaPool
from launcher.inference.server.request_state import DeadlineExceeded, RequestState
from launcher.inference.server.requests import choice_seed, image_parts, run_in_pool
from launcher.inference.server.responses import ApiError, failure_error, invalid
from launcher.inference.server.result_cache import CacheStatus, ResultCache, result_key
from launcher.inference.tokenizer import TextTokenizer

_QUEUE_SIZE = 64
"""Pieces that are there before their reader asks for them."""


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """Text that is added to a choice."""

    text: str
    tokens: tuple[GeneratedToken, ...]
    """Tokens since the last delta; their characters may come with the next one."""
    finish_reason: str | None = None
    """Set in the last delta."""


async def stream_text(
    state: RequestState, tokenizer: TextTokenizer, stop: Sequence[str], *, echo: bool = False
) -> AsyncGenerator[TextDelta]:
    """Yield the text of a sequence as it is generated; end the sequence at a stop string.

    Args:
        state: of the sequence.
        tokenizer: the tokenizer.
        stop: strings that end the text.
        echo: whether the text begins with the prompt's, as one text: each alone may lose a space between them.

    Raises:
        Exception: the error that ended it.
    """
    prompt = state.request.prompt if echo else ()
    # a prompt is decoded once for each of its choices, which all begin at the same time
    text = await run_in_pool(len(prompt), lambda: TextStream(tokenizer.decode, stop, before=prompt))
    before, pending, number = text.opening, [], 0
    sampling = state.request.sampling
    quiet = sampling.min_tokens if stop else 0
    async with aclosing(state.read()) as tokens:
        async for token in tokens:
            number += 1
            pending.append(token)
            is_last = state.finish_reason == "stop" and not state.ended_by_stop_string and number == len(state.tokens)
            if is_last:  # it ends the text and is no part of it
                break
            shown = text.feed(token.id, may_stop=number > quiet)
            if text.stopped is not None:
                state.stop_at(number)
                yield TextDelta(text=before + shown, tokens=tuple(pending), finish_reason="stop")
                return
            if shown:
                yield TextDelta(text=before + shown, tokens=tuple(pending))
                before, pending = "", []
    rest = before + text.rest()
    finish_reason = "stop" if text.stopped is not None else state.finish_reason
    yield TextDelta(text=rest, tokens=tuple(pending), finish_reason=finish_reason)


async def merge_streams(sources: Sequence[AsyncGenerator[TextDelta]]) -> AsyncGenerator[tuple[int, TextDelta]]:
    """Yield the deltas of all sources, with the index of the source, as they arrive.

    Raises:
        Exception: the first that a source raised; the others are closed.
    """
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for delta in only:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, TextDelta | Exception | None]] = asyncio.Queue(_QUEUE_SIZE)

    async def forward(number: int, source: AsyncGenerator[TextDelta]) -> None:
        try:
            async for delta in source:
                await queue.put((number, delta))
            await queue.put((number, None))
        except Exception as error:  # noqa: BLE001  (raised again by the reader)
            await queue.put((number, error))

    tasks = [asyncio.create_task(forward(number, source)) for number, source in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class ChoiceStream:
    """The text of one choice of a response.

    Args:
        client: submits it.
        prompt: tokens to continue.
        model: name of the base model or of an adapter.
        sampling: its parameters.
        stop: strings that end it.
        priority: higher is sooner.
        images: of the prompt.
        echo: whether its text begins with the prompt's.
    """

    def __init__(
        self,
        client: EngineClient,
        prompt: tuple[int, ...],
        model: str,
        sampling: SamplingParams,
        stop: Sequence[str],
        priority: int,
        *,
        images: tuple[RequestImage, ...] = (),
        echo: bool = False,
    ) -> None:
        self._echo, self._stop = echo, stop
        self._client, self._arguments = client, (prompt, model, sampling, stop, priority, images)
        self._started_s = time.monotonic()
        self.request_state, self.cache_status = client.submit(*self._arguments)
        self.num_tokens = 0
        self._is_closed = False

    async def deltas(self) -> AsyncGenerator[TextDelta]:
        """Yield its text as it is generated.

        Raises:
            Exception: the error that ended it.
        """
        tokenizer, stop = self._client.tokenizer, self._stop
        assert tokenizer is not None
        while True:
            try:
                async with aclosing(
                    self._within_time(stream_text(self.request_state, tokenizer, stop, echo=self._echo))
                ) as deltas:
                    async for delta in deltas:
                        self.num_tokens += len(delta.tokens)
                        yield delta
            except DeadlineExceeded:
                if self.cache_status != "shared" or self.num_tokens or self._left_s() <= 0:
                    raise
                # it joined an earlier sequence, whose deadline passed before its own
                self._client.release(self.request_state)
                self.request_state, self.cache_status = self._client.submit(*self._arguments)
            else:
                return

    def close(self) -> None:
        """Stop reading; call it in any case."""
        if not self._is_closed:
            self._is_closed = True
            if self.cache_status in ("hit", "shared"):
                self._client.metrics.count_shared(self.request_state)
            self._client.release(self.request_state)

    async def _within_time(self, deltas: AsyncGenerator[TextDelta]) -> AsyncGenerator[TextDelta]:
        """Yield the same deltas; raise where the engine does not keep the deadline."""
        async with aclosing(deltas):
            while True:
                try:
                    async with asyncio.timeout(max(0.0, self._left_s()) + 1.0):
                        delta = await anext(deltas)
                except TimeoutError:
                    raise DeadlineExceeded(while_queued=False) from None
                except StopAsyncIteration:
                    return
                yield delta

    def _left_s(self) -> float:
        return self._client.limits.request_timeout_s - (time.monotonic() - self._started_s)


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Limits of a server."""

    name: str
    """Model name in clients' requests."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Folders of adapters, by the name that chooses one in requests."""
    capacity: int
    """Sequences that engines work on at a time."""
    max_queue: int
    max_choices: int
    max_images: int = 8
    """Of one request."""
    queue_timeout_s: float
    request_timeout_s: float


class EngineClient:
    """The engines of one served model.

    Args:
        limits: of the server.
        pool: the engines.
        results: cached results.
    """

    def __init__(self, limits: ServerLimits, *, pool: ReplicaPool, results: ResultCache) -> None:
        self.limits, self.pool, self.results = limits, pool, results
        self.metrics = ServerMetrics(pool, results, model=limits.name, adapters=limits.adapters)
        self.created = int(time.time())
        self.tokenizer: TextTokenizer | None = None
        """Set once the tokenizer is there."""
        self.images: ImagePool | None = None
        """Preprocesses images; ``None`` for a model or engine that takes text alone."""
        self.fingerprint_hash = ""
        """Hash of everything that decides the answers; set with ``tokenizer``."""
        self.draining = False
        self.open_requests = 0
        """Generation requests without a complete response."""
        self._shares = CallerShares(capacity=limits.capacity, max_queue=limits.max_queue)
        self._ids = itertools.count()
        self._recent: list[float] = []

    @property
    def fingerprint(self) -> str:
        """The ``system_fingerprint`` of responses."""
        return f"fp_{self.fingerprint_hash[:12]}"

    def not_ready(self) -> str:
        """Return why the server cannot answer now; empty when it can."""
        if self.draining:
            return "the server is ending"
        if self.tokenizer is None or self.pool.max_model_len is None:
            phases = sorted({engine.phase for engine in self.pool.engines})
            return f"the server is starting ({', '.join(phases) or 'tokenizer'})"
        return "" if self.pool.ready else "no engine makes progress"

    def body_limits(self) -> BodyLimits:
        """Return the lengths that bodies may have.

        Raises:
            ApiError: the server takes no requests now.
        """
        if self.draining:
            self.reject("draining")
            raise ApiError(503, "the server is ending", code="draining", retry_s=5, closes=True)
        if self.tokenizer is None or self.pool.max_model_len is None:
            self.reject("starting")
            raise ApiError(503, self.not_ready(), code="starting", retry_s=2)
        return BodyLimits(max_model_len=self.pool.max_model_len, max_prompts=self.limits.max_choices)

    def tokenizer_for(self, model: str | None) -> TextTokenizer:
        """Return the tokenizer, if requests for ``model`` are taken.

        Raises:
            ApiError: it is another model, or the server takes none now.
        """
        if model is not None and model != self.limits.name and model not in self.limits.adapters:
            others = f" and its adapters {', '.join(map(repr, self.limits.adapters))}" if self.limits.adapters else ""
            message = f"there is no model {model[:100]!r}; this server has {self.limits.name!r}{others}"
            raise ApiError(404, message, param="model", code="model_not_found")
        self.body_limits()  # it may have started to drain while a large body was parsed
        assert self.tokenizer is not None
        return self.tokenizer

    async def prepare_images(self, messages: Sequence[ChatMessage], *, field: str) -> tuple[PreparedImage, ...]:
        """Return the images of messages, preprocessed; they are released by ``release_images``.

        Raises:
            ApiError: there are too many, one is not used, or the model takes text only.
        """
        parts = image_parts(messages)
        if not parts:
            return ()
        places = [(f"{field}.{number}.content", part.number) for number, part in parts]
        if self.images is None:
            name, at = places[0]
            said = f"part {at} is an image, and {self.limits.name!r} takes text only on this server"
            raise invalid(said, name, code="unsupported_value")
        if len(parts) > self.limits.max_images:
            said = f"{len(parts)} images come with this request; this server allows {self.limits.max_images}"
            raise invalid(said, field)
        try:
            return await self.images.prepare([part.url for _, part in parts])
        except RefusedImage as refused:
            self.reject("image")
            name, at = places[refused.number]
            raise invalid(f"part {at}: {refused}", name, code="invalid_image") from None

    def release_images(self, images: Sequence[PreparedImage]) -> None:
        """Let images go that ``prepare_images`` returned."""
        if self.images is not None:
            self.images.release(images)

    def reject(self, reason: str) -> None:
        """Count a rejected request."""
        self.metrics.count_rejected(reason)

    def check_capacity(self, prompts: Sequence[Sequence[int]], *, choices: int, field: str, caller: str) -> None:
        """Raise where so many sequences are too many, now, of this caller, or in general.

        Raises:
            ApiError: and why.
        """
        max_model_len, count = self.pool.max_model_len, len(prompts) * choices
        assert max_model_len is not None
        for prompt in prompts:
            if not prompt:
                raise invalid("has no tokens, and a sequence must begin with one", field)
            if len(prompt) >= max_model_len:
                said = f"has {len(prompt)} tokens, and the model takes at most {max_model_len} together with its answer"
                raise invalid(said, field, code="context_length_exceeded")
        if count > self.limits.max_choices:
            param = "n" if choices > 1 else field
            raise invalid(f"asks for {count} sequences at once; this server allows {self.limits.max_choices}", param)
        if self.pool.in_flight + count > self.limits.capacity + self.limits.max_queue:
            self.reject("queue_full")
            raise ApiError(429, "too many requests are waiting", code="queue_full", retry_s=self._retry_after_s())
        if self._shares.exceeds(caller, count):
            self.reject("queue_full")
            raise self._shares.error(retry_s=self._retry_after_s())

    def open_response(self, caller: str, sequences: int) -> None:
        """Count a response that has begun."""
        self.open_requests += 1
        self._shares.acquire(caller, sequences)

    def close_response(self, caller: str, sequences: int) -> None:
        """Count a response that has ended."""
        self.open_requests -= 1
        self._shares.release(caller, sequences)

    def choices(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        model: str,
        n: int,
        stop: Sequence[str],
        priority: int,
        images: tuple[RequestImage, ...] = (),
        echo: bool = False,
    ) -> list[ChoiceStream]:
        """Submit every sequence of a request: ``n`` for each prompt; only a single one has images."""
        kinds = [replace(sampling, seed=choice_seed(sampling.seed, number)) for number in range(n)]
        return [
            ChoiceStream(self, tuple(prompt), model, kind, stop, priority, images=images, echo=echo)
            for prompt in prompts
            for kind in kinds
        ]

    def submit(
        self,
        prompt: tuple[int, ...],
        model: str,
        sampling: SamplingParams,
        stop: Sequence[str],
        priority: int,
        images: tuple[RequestImage, ...] = (),
    ) -> tuple[RequestState, CacheStatus]:
        """Submit a sequence, join an equal one in flight, or find its cached result."""
        request = EngineRequest(
            id=f"s{next(self._ids)}",
            prompt=prompt,
            sampling=sampling,
            images=images,
            adapter="" if model == self.limits.name else model,
            priority=priority,
            queue_deadline_s=self.limits.queue_timeout_s,
            deadline_s=self.limits.request_timeout_s,
        )
        if not sampling.is_deterministic:
            state, cache_status = RequestState(request, on_end=self._on_end), "bypass"
        else:
            adapter = request.adapter
            key = result_key(self.fingerprint_hash, prompt, sampling, stop, adapter=adapter, images=images)
            state, cache_status = self.results.find(key, RequestState(request, on_end=partial(self._complete, key)))
        state.num_readers += 1
        if cache_status in ("miss", "bypass"):
            self.pool.submit(state)
        return state, cache_status  # type: ignore[return-value]

    def release(self, state: RequestState) -> None:
        """Remove a reader of a sequence; without any, cancel it."""
        state.num_readers -= 1
        if not state.num_readers and not state.is_done:
            state.fail(ClientsDisconnected())

    def _complete(self, key: str, state: RequestState) -> None:
        self.results.complete(key, state)
        self._on_end(state)

    def _on_end(self, state: RequestState) -> None:
        self.pool.release(state)
        self.metrics.count_ended(state)
        now = time.monotonic()
        self._recent = [at for at in self._recent[-63:] if now - at < 60.0] + [now]

    def _retry_after_s(self) -> float:
        """Return when there may be capacity again, by the rate at which sequences ended lately."""
        if len(self._recent) < 2:
            return 1.0
        rate = len(self._recent) / max(0.1, time.monotonic() - self._recent[0])
        return min(60.0, self.pool.in_flight / max(rate, 0.01) / 4)


class ClientsDisconnected(Exception):
    """All clients that read a sequence have disconnected."""

    reason = "abandoned"


def to_api_error(error: Exception, client: EngineClient, *, field: str) -> ApiError:
    """Return the response for ``error``, and count it as rejected where nothing was started."""
    problem = failure_error(error, prompt_field=field)
    if problem.code in ("queue_timeout", "unsupported_value"):
        client.reject(problem.code)
    return problem
