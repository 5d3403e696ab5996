"""From choices to an answer: what completions and chats have in common, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from launcher.serving.api.bodies import Generating
from launcher.serving.api.choice import Choice
from launcher.serving.api.events import Data, EventStream, until_gone
from launcher.serving.api.parsing import SLICE, encode_json
from launcher.serving.api.sequence import Piece, merged
from launcher.serving.api.service import Service, explained
from launcher.serving.values import Token
from launcher.serving.words import Words


class Answer(ABC):
    """One answer with all its choices; subclasses say how text and tokens are shown.

    Args:
        service: of the model.
        body: what was asked.
        choices: begun already, in the order of their index.
        prompts: the tokens of each prompt.
        words: of the model.
    """

    prefix: str
    """Of ids."""
    whole: str
    """Name of the object."""
    part: str
    """Name of the object in streams."""
    prompt_field: str
    """Where a prompt stands in the body."""

    def __init__(
        self,
        service: Service,
        body: Generating,
        *,
        choices: Sequence[Choice],
        prompts: Sequence[Sequence[int]],
        words: Words,
    ) -> None:
        self.service, self.body, self.choices, self.words = service, body, choices, words
        self._prompt_tokens = sum(map(len, prompts))
        self._begun: set[int] = set()
        """Choices of which a token has been shown that is text."""
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        service.open_requests += 1

    @abstractmethod
    def choice(self, index: int, text: str, logprobs: Data | None, finish: str | None) -> Data:
        """Return a whole choice."""

    @abstractmethod
    def logprobs(self, index: int, tokens: Sequence[Token]) -> Data | None:
        """Return lists that have an element for each token; ``None`` where they are not asked for."""

    @abstractmethod
    def delta(self, index: int, piece: Piece) -> Data:
        """Return what a piece adds to its choice."""

    def openings(self) -> list[Data]:
        """Return what a stream begins with."""
        return []

    async def respond(self, request: Request) -> Response:
        """Return the answer."""
        if self.body.stream:
            return EventStream(
                self._events(),
                explain=lambda trouble: explained(trouble, self.service, field=self.prompt_field),
                on_end=self._over,
                headers=self._headers(),
            )
        try:
            return await until_gone(request, self._collect())
        finally:
            self._over()

    def is_first(self, index: int, token: int) -> bool:
        """Return whether the text of a choice begins with this token, its next one."""
        is_first = index not in self._begun
        if not self.words.is_special(token):
            self._begun.add(index)
        return is_first

    async def _collect(self) -> Response:
        texts: list[list[str]] = [[] for _ in self.choices]
        tokens: list[list[Token]] = [[] for _ in self.choices]
        finishes: list[str | None] = [None] * len(self.choices)
        try:
            async with aclosing(merged([choice.pieces() for choice in self.choices])) as pieces:
                async for index, piece in pieces:
                    texts[index].append(piece.text)
                    tokens[index].extend(piece.tokens)
                    finishes[index] = piece.finish or finishes[index]
        except Exception as trouble:  # noqa: BLE001  (every one is told to the client)
            return explained(trouble, self.service, field=self.prompt_field).response()
        choices = []
        for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            logprobs = await self._all_logprobs(index, tokens[index])
            choices.append(await encode_json(self.choice(index, "".join(text), logprobs, finish)))
        around = await encode_json(self._object(self.whole, [], usage=self._usage()))
        before, empty, after = around.partition(b'"choices":[]')
        content = [before, empty[:-1], b",".join(choices), b"]", after]
        return Response(b"".join(content), headers=self._headers(), media_type="application/json")

    async def _all_logprobs(self, index: int, tokens: Sequence[Token]) -> Data | None:
        """Return the lists of a whole choice, with turns for other requests."""
        whole = self.logprobs(index, tokens[:SLICE])
        if whole is None:
            return None
        for start in range(SLICE, len(tokens), SLICE):
            await asyncio.sleep(0)
            more = self.logprobs(index, tokens[start : start + SLICE])
            assert more is not None
            for name, values in more.items():
                if isinstance(values, list):
                    whole[name] += values
        return whole

    async def _events(self) -> AsyncGenerator[Data]:
        async with aclosing(merged([choice.pieces() for choice in self.choices])) as pieces:
            has_begun = False
            async for index, piece in pieces:
                if not has_begun:
                    has_begun = True
                    for opening in self.openings():
                        yield self._chunk([opening])
                yield self._chunk([self.delta(index, piece)])
        if self.body.wants_usage:
            yield self._object(self.part, [], usage=self._usage())

    def _chunk(self, choices: list[Data]) -> Data:
        if self.body.wants_usage:
            return self._object(self.part, choices, usage=None)
        return self._object(self.part, choices)

    def _object(self, name: str, choices: list[Data], **more: Any) -> Data:
        about = {"object": name, "model": self.service.policy.name, "system_fingerprint": self.service.fingerprint}
        return {**self._head, **about, "choices": choices, **more}

    def _usage(self) -> Data:
        completion = sum(choice.num_tokens for choice in self.choices)
        first = self.choices[:: max(1, self.body.n)]
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.flight.cached_tokens for choice in first)},
        }

    def _headers(self) -> dict[str, str]:
        """Return whether results were there already: all, or else the least that was."""
        hows = {choice.how for choice in self.choices}
        said = next(how for how in ("bypass", "miss", "shared", "hit") if how in hows)
        return {"x-cache": "hit" if said == "shared" else said}

    def _over(self) -> None:
        self.service.open_requests -= 1
        for choice in self.choices:
            choice.leave()
