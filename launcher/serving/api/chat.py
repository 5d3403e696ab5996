"""``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from launcher.serving.api.answer import Answer
from launcher.serving.api.bodies import ChatBody
from launcher.serving.api.parsing import parse
from launcher.serving.api.problems import invalid
from launcher.serving.api.prompts import encode_chat
from launcher.serving.api.sampling import sampling_of
from launcher.serving.api.sequence import Piece
from launcher.serving.api.service import Service
from launcher.serving.values import Token


class Chat(Answer):
    """The next message of a conversation."""

    prefix, whole, part, prompt_field = "chatcmpl", "chat.completion", "chat.completion.chunk", "messages"
    body: ChatBody

    def choice(self, index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        """Return a whole choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def openings(self) -> list[dict[str, Any]]:
        """Return who speaks, for each choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(len(self.choices))
        ]

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return more text of a choice."""
        delta = {"content": piece.text} if piece.text else {}
        logprobs = self.logprobs(index, piece.tokens) if piece.tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Return the newer of OpenAI's two shapes: a list of objects."""
        if not self.body.logprobs:
            return None
        rows = []
        for token in tokens:
            first = self.is_first(index, token.id)
            others = [self._shown(*other, first=first) for other in token.top]
            rows.append({**self._shown(token.id, token.logprob, first=first), "top_logprobs": others})
        return {"content": rows, "refusal": None}

    def _shown(self, token: int, logprob: float | None, *, first: bool) -> dict[str, Any]:
        text, raw = self.words.text_of(token, first=first), self.words.bytes_of(token, first=first)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


async def chat(service: Service, request: Request) -> Response:
    """Answer one request."""
    body = await parse(ChatBody, await request.body(), service.bounds())
    words = service.opened(body.model)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("says otherwise than max_completion_tokens; give one", "max_tokens")
    prompt = await encode_chat(words, body.messages, template=body.chat_template)
    service.check_room([prompt], choices=body.n, field="messages")
    context = service.pool.context
    assert context is not None
    most = body.max_completion_tokens or body.max_tokens or context - len(prompt)
    sampling = sampling_of(body, max_tokens=most, vocab_size=words.vocab_size)
    choices = service.choices([prompt], sampling, n=body.n, stops=body.stops, priority=body.priority)
    return await Chat(service, body, choices=choices, prompts=[prompt], words=words).respond(request)
