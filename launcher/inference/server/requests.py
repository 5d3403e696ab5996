"""From the bytes of a body to what an engine is asked: JSON, tokens, sampling parameters.

JSON is parsed, validated and written with bounded work, so that no request delays others.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from launcher.config.sampling import SamplingParams, validate_sampling
from launcher.inference.server.protocol import (
    BodyLimits,
    ChatBody,
    ChatMessage,
    CompletionBody,
    GenerationBody,
    ImagePart,
    RequestBody,
)
from launcher.inference.server.responses import ApiError, invalid, validation_error
from launcher.inference.tokenizer import ChatTemplateNotFound, InvalidMessages, TextTokenizer, normalize_messages

B = TypeVar("B", bound=RequestBody)
MAX_VALUES = 1 << 18
"""Most values in a body: commas outside of strings, which take some 20 ms to parse."""
MAX_CONTAINERS = 1 << 14
"""Lists and objects in a body."""
MAX_NAMES = 1 << 14
"""Fields of all objects in a body."""
SLICE_ITEMS = 64
"""Elements of a long list that are written before other requests have their turn."""
_LARGE_BODY_BYTES = 1 << 14
"""Bytes of a body that is parsed in a millisecond, whatever it holds."""
_num_waiting = 0
"""Large bodies that have come and are not parsed."""
_DEPTH = 4
"""Where answers have their long lists: choices, choice, logprobs, list."""
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{,:]', re.DOTALL)
"""A complete or open string, or a character that begins or separates values.
It never backtracks."""


async def parse_body(body_type: type[B], data: bytes, limits: BodyLimits) -> B:
    """Return the body that ``data`` holds.

    Args:
        body_type: what it should be.
        data: its JSON.
        limits: lengths that this server takes.

    Raises:
        ApiError: it holds none; the message names the field.
    """
    async with _in_turn(data):
        tree = await _parse_object(data)
        try:
            with _without_collections():
                return body_type.model_validate(tree, context=limits)
        except ValidationError as error:
            raise validation_error(error, body_type) from None


async def read_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object that ``data`` holds.

    Raises:
        ApiError: it holds none, or too many values.
    """
    async with _in_turn(data):
        return await _parse_object(data)


@contextlib.asynccontextmanager
async def _in_turn(data: bytes) -> AsyncIterator[None]:
    """Yield to the event loop for every large body that waits, so that not all parse at once."""
    global _num_waiting
    if len(data) > _LARGE_BODY_BYTES:
        _num_waiting += 1
        try:
            for _ in range(_num_waiting):
                await asyncio.sleep(0)
        finally:
            _num_waiting -= 1
    yield


async def _parse_object(data: bytes) -> dict[str, Any]:
    if _may_be_large(data):
        await asyncio.to_thread(_check_size, data)
    try:
        with _without_collections():  # one takes longer than the rest
            # fields refuse NaN by their names
            tree = from_json(data, allow_inf_nan=True, cache_strings="keys")
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is not JSON: it is nested too deeply", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_value")
    return tree


def _may_be_large(data: bytes) -> bool:
    """Return whether there may be too many values: a quick upper bound.

    Characters in strings count too.
    """
    containers = data.count(b"[") + data.count(b"{")
    return data.count(b",") > MAX_VALUES or containers > MAX_CONTAINERS or data.count(b":") > MAX_NAMES


def _check_size(data: bytes) -> None:
    """Raise where there are too many values.

    Raises:
        ApiError: and how many there may be.
    """
    values = containers = names = 0
    for match in _TOKEN.finditer(data):
        match data[match.start()]:
            case 0x2C:  # ,
                values += 1
            case 0x3A:  # :
                names += 1
            case 0x5B | 0x7B:  # [ {
                containers += 1
        if values > MAX_VALUES or containers > MAX_CONTAINERS or names > MAX_NAMES:
            said = f"the body has more than {MAX_VALUES:,} values, {MAX_CONTAINERS:,} lists and objects, or "
            raise ApiError(400, f"{said}{MAX_NAMES:,} fields of objects", code="too_many_values")


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


async def encode_json(value: Any) -> bytes:
    """Return the JSON of an answer, written with turns for other requests."""
    parts: list[str] = []
    await _encode(value, parts, depth=0)
    return "".join(parts).encode()


async def _encode(value: Any, parts: list[str], *, depth: int) -> None:
    if isinstance(value, dict) and value and depth < _DEPTH:
        for at, (name, each) in enumerate(value.items()):
            parts.append(f"{',' if at else '{'}{_dumps(name)}:")
            await _encode(each, parts, depth=depth + 1)
        parts.append("}")
    elif isinstance(value, list) and value and depth < _DEPTH and len(value) <= SLICE_ITEMS:
        for at, each in enumerate(value):
            parts.append("," if at else "[")
            await _encode(each, parts, depth=depth + 1)
        parts.append("]")
    elif isinstance(value, list) and len(value) > SLICE_ITEMS:
        for start in range(0, len(value), SLICE_ITEMS):
            parts.append(("," if start else "[") + _dumps(value[start : start + SLICE_ITEMS])[1:-1])
            await asyncio.sleep(0)
        parts.append("]")
    else:
        parts.append(_dumps(value))


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


T = TypeVar("T")
_INLINE_CHARACTERS = 2000
"""Characters that are tokenised in well under a millisecond."""
_LARGE_CHARACTERS = 1 << 16
"""Characters of a text above which texts are tokenised one at a time.
Their tokens take tens of megabytes meanwhile."""
_CHARACTERS_PER_MESSAGE = 100
"""Characters that a template spends on a message, by the time that this takes."""
_pool = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
_pool_of_large = ThreadPoolExecutor(1, thread_name_prefix="tokenize-large")
Prompts = str | list[int] | list[str] | list[list[int]]


async def encode_prompts(tokenizer: TextTokenizer, prompt: Prompts, *, max_model_len: int) -> list[list[int]]:
    """Return the tokens of every prompt.

    Raises:
        ApiError: a token that the tokenizer does not have, a text that is too long whatever its tokens are, or one that
            holds what stands for an image.
    """
    if isinstance(prompt, str):
        prompt = [prompt]
    texts = [each for each in prompt if isinstance(each, str)]
    if texts:
        most = tokenizer.max_characters(max_model_len)
        if (longest := max(map(len, texts))) > most:
            said = f"has {longest:,} characters, and no text of more than {most:,} fits into {max_model_len:,} tokens"
            raise invalid(said, "prompt", code="context_length_exceeded")
        if tokenizer.image_token and any(tokenizer.image_token in text for text in texts):
            raise invalid(tokenizer.mark_in_text, "prompt", code="invalid_value")
        return await run_in_pool(sum(map(len, texts)), lambda: tokenizer.encode_all(texts))
    lists = [each for each in prompt if isinstance(each, list)] or [[each for each in prompt if isinstance(each, int)]]
    for ids in lists:
        check_vocabulary(ids, tokenizer.vocab_size, field="prompt")
    return lists


def check_vocabulary(ids: Sequence[int], vocab_size: int, *, field: str) -> None:
    """Check that a tokenizer of ``vocab_size`` tokens has all of ``ids``, which are at least 0.

    Raises:
        ApiError: it does not have one of them.
    """
    if (largest := max(ids, default=0)) >= vocab_size:
        raise invalid(_no_token(str(largest), vocab_size), field)


def _no_token(shown: str, vocab_size: int) -> str:
    return f"{shown} is not a token of this model, whose tokens are 0 to {vocab_size - 1}"


async def encode(tokenizer: TextTokenizer, text: str, *, special: bool = True) -> list[int]:
    """Return the tokens of a text."""
    return (await run_in_pool(len(text), lambda: tokenizer.encode_all([text], special=special)))[0]


async def decode(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    """Return the text of tokens."""
    return await run_in_pool(len(ids), lambda: tokenizer.decode(ids))


async def encode_chat(
    tokenizer: TextTokenizer,
    messages: Sequence[ChatMessage],
    *,
    images: Sequence[str] = (),
    template: str | None = None,
    field: str = "messages",
) -> list[int]:
    """Return the tokens of a conversation, up to where its answer begins.

    Args:
        tokenizer: the tokenizer.
        messages: the conversation.
        images: what the model's processor writes for each image of the messages.
        template: name of the chat template; ``None`` is the default.
        field: where the messages stand.

    Raises:
        ApiError: the model has no such chat template, or its template refuses the messages.
    """
    try:
        plain = [_plain_message(message, f"{field}.{number}") for number, message in enumerate(messages)]
        size = sum(map(_num_characters, messages)) + sum(map(len, images)) + _CHARACTERS_PER_MESSAGE * len(plain)
        return await run_in_pool(size, lambda: tokenizer.encode_chat(plain, template=template, images=images))
    except InvalidMessages as bad:
        raise invalid(str(bad), bad.field, code="invalid_value") from None
    except ChatTemplateNotFound as error:
        if template:
            raise invalid(str(error), "chat_template", code="no_chat_template") from None
        raise invalid(f"{error}; use /v1/completions", field, code="no_chat_template") from None
    except ValueError as refusal:
        raise invalid(f"the model's template refuses them: {refusal}", field) from None


def image_parts(messages: Sequence[ChatMessage]) -> list[tuple[int, ImagePart]]:
    """Return the images of messages, each with the number of its message."""
    return [
        (number, part)
        for number, message in enumerate(messages)
        for part in message.content
        if isinstance(part, ImagePart)
    ]


def _plain_message(message: ChatMessage, field: str) -> dict[str, Any]:
    """Return a message as templates take it."""
    if isinstance(message.content, str):
        return dict(normalize_messages([message.model_dump()], field=field)[0])
    parts = (
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part} for part in message.content
    )
    return {"role": message.role, "content": list(parts)}


def _num_characters(message: ChatMessage) -> int:
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(part) for part in message.content if isinstance(part, str))


async def run_in_pool(size: int, work: Callable[[], T]) -> T:
    """Return the result of ``work``, on a thread if it is slow; it should release the GIL."""
    if size <= _INLINE_CHARACTERS:
        return work()
    pool = _pool if size <= _LARGE_CHARACTERS else _pool_of_large
    return await asyncio.get_running_loop().run_in_executor(pool, work)


def sampling_params(body: GenerationBody, *, max_tokens: int, vocab_size: int) -> SamplingParams:
    """Return the sampling of choice 0.

    Raises:
        ApiError: fields that contradict each other, or the vocabulary.
    """
    if body.stream_options is not None and not body.stream:
        raise invalid("is for streams; set stream", "stream_options")
    if body.min_tokens > max_tokens:
        raise invalid(f"is above max_tokens={max_tokens}", "min_tokens")
    check_vocabulary(body.stop_token_ids, vocab_size, field="stop_token_ids")
    temperature = body.temperature if body.temperature is not None else 0.0 if body.num_beams > 1 else 1.0
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        no_repeat_ngram_size=body.no_repeat_ngram_size,
        logit_bias=_logit_bias(body, vocab_size),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        seed=None if body.seed is None else body.seed % 2**63,
        logprobs=_logprobs(body),
        num_beams=body.num_beams,
        length_penalty=body.length_penalty,
    )
    for field, why, _ in validate_sampling(sampling):
        value = getattr(sampling, field)
        said = why if isinstance(value, tuple) else f"is {value}: {why}"
        raise invalid(said, field, code="invalid_value")
    return sampling


def choice_seed(seed: int | None, choice: int) -> int | None:
    """Return the seed of one of ``n`` choices; the first has the request's own."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63


def _logprobs(body: GenerationBody) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    assert isinstance(body, ChatBody)
    if body.top_logprobs and not body.logprobs:
        raise invalid("needs logprobs=true", "top_logprobs")
    return body.top_logprobs if body.logprobs else None


def _logit_bias(body: GenerationBody, vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = []
    for name, value in body.logit_bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            raise invalid(_no_token(repr(name[:20]), vocab_size), "logit_bias")
        pairs.append((int(name), value))
    return tuple(sorted(pairs))
