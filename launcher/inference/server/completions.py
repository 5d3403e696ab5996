"""``/v1/completions`` and ``/v1/chat/completions``, whole or as a stream."""

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

from launcher.inference.detokenizer import Detokenizer
from launcher.inference.engine.base import GeneratedToken
from launcher.inference.server.engine_client import ChoiceStream, EngineClient, TextDelta, merge_streams, to_api_error
from launcher.inference.server.image_pool import PreparedImage
from launcher.inference.server.middleware import caller_of
from launcher.inference.server.protocol import ChatBody, CompletionBody, GenerationBody
from launcher.inference.server.requests import (
    SLICE_ITEMS,
    encode_chat,
    encode_json,
    encode_prompts,
    parse_body,
    sampling_params,
)
from launcher.inference.server.responses import EventData, EventStream, invalid, run_until_disconnect
from launcher.inference.tokenizer import TextTokenizer


class GenerationResponse(ABC):
    """A response with all its choices; subclasses format text and tokens.

    Args:
        client: of the model.
        body: of the request.
        choices: submitted already, in the order of their index.
        prompts: the tokens of each prompt.
        images: of the prompt, which are released at the end.
        tokenizer: of the model.
        caller: who asked.
    """

    prefix: str
    """Of ids."""
    whole: str
    """Name of the object."""
    part: str
    """Name of the object in streams."""
    prompt_field: str
    """Name of the prompt's field in the body."""

    def __init__(
        self,
        client: EngineClient,
        body: GenerationBody,
        *,
        choices: Sequence[ChoiceStream],
        prompts: Sequence[Sequence[int]],
        images: Sequence[PreparedImage] = (),
        tokenizer: TextTokenizer,
        caller: str,
    ) -> None:
        self._images = images
        self.client, self.body, self.choices, self.tokenizer = client, body, choices, tokenizer
        self._caller = caller
        self._prompt_tokens = sum(map(len, prompts))
        self._started: set[int] = set()
        """Choices with a token that is text."""
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        client.open_response(caller, len(choices))

    @abstractmethod
    def choice(self, index: int, text: str, logprobs: EventData | None, finish: str | None) -> EventData:
        """Return a whole choice."""

    @abstractmethod
    def logprobs(self, index: int, tokens: Sequence[GeneratedToken]) -> EventData | None:
        """Return lists that have an element for each token; ``None`` where they are not asked for."""

    @abstractmethod
    def delta(self, index: int, delta: TextDelta) -> EventData:
        """Return the fields of a delta in its choice."""

    def openings(self) -> list[EventData]:
        """Return the first events of a stream."""
        return []

    async def respond(self, request: Request) -> Response:
        """Return the answer."""
        if self.body.stream:
            return EventStream(
                self._events(),
                explain=lambda error: to_api_error(error, self.client, field=self.prompt_field),
                on_end=self._close,
                headers=self._headers(),
            )
        try:
            return await run_until_disconnect(request, self._collect())
        finally:
            self._close()

    def is_first(self, index: int, token: int) -> bool:
        """Return whether the text of a choice begins with this token, its next one."""
        is_first = index not in self._started
        if not self.tokenizer.is_special(token):
            self._started.add(index)
        return is_first

    async def _collect(self) -> Response:
        texts: list[list[str]] = [[] for _ in self.choices]
        tokens: list[list[GeneratedToken]] = [[] for _ in self.choices]
        finishes: list[str | None] = [None] * len(self.choices)
        try:
            async with aclosing(merge_streams([choice.deltas() for choice in self.choices])) as deltas:
                async for index, delta in deltas:
                    texts[index].append(delta.text)
                    tokens[index].extend(delta.tokens)
                    finishes[index] = delta.finish_reason or finishes[index]
        except Exception as error:  # noqa: BLE001  (each becomes an error of the response)
            return to_api_error(error, self.client, field=self.prompt_field).response()
        choices = []
        for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            logprobs = await self._all_logprobs(index, tokens[index])
            choices.append(await encode_json(self.choice(index, "".join(text), logprobs, finish)))
        around = await encode_json(self._object(self.whole, [], usage=self._usage()))
        before, empty, after = around.partition(b'"choices":[]')
        content = [before, empty[:-1], b",".join(choices), b"]", after]
        return Response(b"".join(content), headers=self._headers(), media_type="application/json")

    async def _all_logprobs(self, index: int, tokens: Sequence[GeneratedToken]) -> EventData | None:
        """Return the lists of a whole choice, with turns for other requests."""
        whole = self.logprobs(index, tokens[:SLICE_ITEMS])
        if whole is None:
            return None
        for start in range(SLICE_ITEMS, len(tokens), SLICE_ITEMS):
            await asyncio.sleep(0)
            more = self.logprobs(index, tokens[start : start + SLICE_ITEMS])
            assert more is not None
            for name, values in more.items():
                if isinstance(values, list):
                    whole[name] += values
        return whole

    async def _events(self) -> AsyncGenerator[EventData]:
        async with aclosing(merge_streams([choice.deltas() for choice in self.choices])) as deltas:
            has_begun = False
            async for index, delta in deltas:
                if not has_begun:
                    has_begun = True
                    for opening in self.openings():
                        yield self._chunk([opening])
                yield self._chunk([self.delta(index, delta)])
        if self.body.wants_usage:
            yield self._object(self.part, [], usage=self._usage())

    def _chunk(self, choices: list[EventData]) -> EventData:
        if self.body.wants_usage:
            return self._object(self.part, choices, usage=None)
        return self._object(self.part, choices)

    def _object(self, name: str, choices: list[EventData], **more: Any) -> EventData:
        about = {"object": name, "model": self.body.model, "system_fingerprint": self.client.fingerprint}
        return {**self._head, **about, "choices": choices, **more}

    def _usage(self) -> EventData:
        completion = sum(choice.num_tokens for choice in self.choices)
        first = self.choices[:: max(1, self.body.n)]
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.request_state.num_cached_tokens for choice in first)},
        }

    def _headers(self) -> dict[str, str]:
        """Return the cache status of the whole response: the worst one of its choices."""
        statuses = {choice.cache_status for choice in self.choices}
        status = next(each for each in ("bypass", "miss", "shared", "hit") if each in statuses)
        return {"x-cache": "hit" if status == "shared" else status}

    def _close(self) -> None:
        self.client.close_response(self._caller, len(self.choices))
        for choice in self.choices:
            choice.close()
        self.client.release_images(self._images)
        self._images = ()


class CompletionResponse(GenerationResponse):
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

    def delta(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """Return more text of a choice."""
        logprobs = self.logprobs(index, delta.tokens)
        return {"text": delta.text, "index": index, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def logprobs(self, index: int, tokens: Sequence[GeneratedToken]) -> dict[str, Any] | None:
        """Return the older of OpenAI's two shapes: lists side by side."""
        if self.body.logprobs is None:
            return None
        text = self._texts.setdefault(index, Detokenizer(self.tokenizer.decode))
        shown, tops, offsets = [], [], []
        at = self._offsets.get(index, 0)
        for token in tokens:
            first = self.is_first(index, token.id)
            shown.append(self.tokenizer.text_of(token.id, first=first))
            top: dict[str, float] = {}
            for other, score in token.top:  # of tokens with the same text, the likeliest
                top.setdefault(self.tokenizer.text_of(other, first=first), score)
            tops.append(top)
            offsets.append(at)
            at += len(text.feed(token.id))
        self._offsets[index] = at
        logprobs = [token.logprob for token in tokens]
        return {"tokens": shown, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


async def create_completion(client: EngineClient, request: Request) -> Response:
    """Answer one request."""
    body = await parse_body(CompletionBody, await request.body(), client.body_limits())
    tokenizer = client.tokenizer_for(body.model)
    if body.best_of not in (None, body.n):
        raise invalid("only n itself is supported", "best_of", code="unsupported_value")
    if body.echo and body.logprobs is not None:
        raise invalid("log-probabilities of prompts are not supported; leave echo or logprobs out", "echo")
    sampling = sampling_params(body, max_tokens=body.max_tokens, vocab_size=tokenizer.vocab_size)
    assert client.pool.max_model_len is not None
    prompts = await encode_prompts(tokenizer, body.prompt, max_model_len=client.pool.max_model_len)
    caller = caller_of(request.scope)
    client.check_capacity(prompts, choices=body.n, field="prompt", caller=caller)
    choices = client.choices(
        prompts,
        sampling,
        model=body.model,
        n=body.n,
        stop=body.stop_strings,
        priority=body.priority,
        echo=body.echo,
    )
    response = CompletionResponse(client, body, choices=choices, prompts=prompts, tokenizer=tokenizer, caller=caller)
    return await response.respond(request)


class ChatResponse(GenerationResponse):
    """The next message of a conversation."""

    prefix, whole, part, prompt_field = "chatcmpl", "chat.completion", "chat.completion.chunk", "messages"
    body: ChatBody

    def choice(self, index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        """Return a whole choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def openings(self) -> list[dict[str, Any]]:
        """Return the role of each choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(len(self.choices))
        ]

    def delta(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """Return more text of a choice."""
        content = {"content": delta.text} if delta.text else {}
        logprobs = self.logprobs(index, delta.tokens) if delta.tokens else None
        return {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def logprobs(self, index: int, tokens: Sequence[GeneratedToken]) -> dict[str, Any] | None:
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
        text, raw = self.tokenizer.text_of(token, first=first), self.tokenizer.bytes_of(token, first=first)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


async def create_chat_completion(client: EngineClient, request: Request) -> Response:
    """Answer one request."""
    body = await parse_body(ChatBody, await request.body(), client.body_limits())
    tokenizer = client.tokenizer_for(body.model)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("differs from max_completion_tokens; send only one of them", "max_tokens")
    images = await client.prepare_images(body.messages, field="messages")
    try:
        texts = [each.text for each in images]
        prompt = await encode_chat(tokenizer, body.messages, images=texts, template=body.chat_template)
        caller = caller_of(request.scope)
        client.check_capacity([prompt], choices=body.n, field="messages", caller=caller)
        max_model_len = client.pool.max_model_len
        assert max_model_len is not None
        most = body.max_completion_tokens or body.max_tokens or max_model_len - len(prompt)
        sampling = sampling_params(body, max_tokens=most, vocab_size=tokenizer.vocab_size)
        choices = client.choices(
            [prompt],
            sampling,
            model=body.model,
            n=body.n,
            stop=body.stop_strings,
            priority=body.priority,
            images=tuple(each.image for each in images),
        )
        response = ChatResponse(
            client, body, choices=choices, prompts=[prompt], images=images, tokenizer=tokenizer, caller=caller
        )
    except BaseException:
        client.release_images(images)
        raise
    return await response.respond(request)
