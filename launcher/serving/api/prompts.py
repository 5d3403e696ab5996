"""Prompts to tokens, off the event loop where there is much of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from launcher.serving.api.bodies import Message
from launcher.serving.api.problems import invalid
from launcher.serving.words import NoTemplate, Words

T = TypeVar("T")
_AT_ONCE = 2000
"""Characters that are tokenised in well under a millisecond."""

Prompts = str | list[int] | list[str] | list[list[int]]


async def encode_all(words: Words, prompt: Prompts) -> list[list[int]]:
    """Return the tokens of every prompt.

    Raises:
        ApiError: a token that the tokenizer does not have.
    """
    if isinstance(prompt, str):
        return [await encode(words, prompt)]
    texts = [each for each in prompt if isinstance(each, str)]
    if texts:
        size = sum(map(len, texts))
        return await _where_it_fits(size, lambda: [words.encode(text) for text in texts])
    lists = [each for each in prompt if isinstance(each, list)] or [[each for each in prompt if isinstance(each, int)]]
    for ids in lists:
        if (largest := max(ids)) >= words.vocab_size:
            raise invalid(f"token {largest} is not in the vocabulary of {words.vocab_size}", "prompt")
    return lists


async def encode(words: Words, text: str, *, special: bool = True) -> list[int]:
    """Return the tokens of a text."""
    return await _where_it_fits(len(text), lambda: words.encode(text, special=special))


async def encode_chat(words: Words, messages: Sequence[Message], *, field: str = "messages") -> list[int]:
    """Return the tokens of a conversation, up to where its answer begins.

    Raises:
        ApiError: the model has no chat template, or its template refuses the messages.
    """
    plain = [message.plain for message in messages]
    size = sum(len(message["content"]) for message in plain)
    try:
        return await _where_it_fits(size, lambda: words.encode(words.render(plain), special=False))
    except NoTemplate:
        said = "this model has no chat template; use /v1/completions"
        raise invalid(said, field, code="no_chat_template") from None
    except ValueError as refusal:
        raise invalid(f"the model's template refuses them: {refusal}", field) from None


async def _where_it_fits(size: int, work: Callable[[], T]) -> T:
    return work() if size <= _AT_ONCE else await asyncio.to_thread(work)
