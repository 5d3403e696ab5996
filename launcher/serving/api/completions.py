"""``/v1/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from launcher.serving.api.answer import Answer
from launcher.serving.api.bodies import CompletionBody
from launcher.serving.api.parsing import parse
from launcher.serving.api.problems import invalid
from launcher.serving.api.prompts import encode_all
from launcher.serving.api.sampling import sampling_of
from launcher.serving.api.sequence import Piece
from launcher.serving.api.service import Service
from launcher.serving.text import Detokenizer
from launcher.serving.values import Token


class Completion(Answer):
    """Text after a prompt."""

    prefix, whole, part, prompt_field = "cmpl", "text_completion", "text_completion", "prompt"
    body: CompletionBody

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._offsets: dict[int, int] = {}
        """Characters of each choice that are out."""
        self._texts: dict[int, Detokenizer] = {}

    def choice(self, index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        """Return a whole choice."""
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return more text of a choice."""
        logprobs = self.logprobs(index, piece.tokens)
        return {"text": piece.text, "index": index, "logprobs": logprobs, "finish_reason": piece.finish}

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Return the older of OpenAI's two shapes: lists side by side."""
        if self.body.logprobs is None:
            return None
        text = self._texts.setdefault(index, Detokenizer(self.words.decode))
        shown, tops, offsets = [], [], []
        at = self._offsets.get(index, 0)
        for token in tokens:
            first = self.is_first(index, token.id)
            shown.append(self.words.text_of(token.id, first=first))
            top: dict[str, float] = {}
            for other, score in token.top:  # of tokens with the same text, the likeliest
                top.setdefault(self.words.text_of(other, first=first), score)
            tops.append(top)
            offsets.append(at)
            at += len(text.feed(token.id))
        self._offsets[index] = at
        logprobs = [token.logprob for token in tokens]
        return {"tokens": shown, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


async def complete(service: Service, request: Request) -> Response:
    """Answer one request."""
    body = await parse(CompletionBody, await request.body(), service.bounds())
    words = service.opened(body.model)
    if body.best_of not in (None, body.n):
        raise invalid("only n itself is supported", "best_of", code="unsupported_value")
    if body.echo and body.logprobs is not None:
        raise invalid("log-probabilities of prompts are not supported; leave echo or logprobs out", "echo")
    sampling = sampling_of(body, max_tokens=body.max_tokens, vocab_size=words.vocab_size)
    assert service.pool.context is not None
    prompts = await encode_all(words, body.prompt, context=service.pool.context)
    service.check_room(prompts, choices=body.n, field="prompt")
    choices = service.choices(prompts, sampling, n=body.n, stops=body.stops, priority=body.priority, echo=body.echo)
    return await Completion(service, body, choices=choices, prompts=prompts, words=words).respond(request)
