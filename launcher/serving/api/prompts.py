"""Prompts to tokens, off the event loop where there is much of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from launcher.serving.api.bodies import Message
from launcher.serving.api.problems import invalid
from launcher.serving.chat import BadMessages, NoTemplate, plain_messages
from launcher.serving.words import Words

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


async def encode_chat(
    words: Words, messages: Sequence[Message], *, template: str | None = None, field: str = "messages"
) -> list[int]:
    """Return the tokens of a conversation, up to where its answer begins.

    Args:
        words: the tokenizer.
        messages: the conversation.
        template: name of the chat template; ``None`` is the default.
        field: where the messages stand.

    Raises:
        ApiError: the model has no such chat template, or its template refuses the messages.
    """
    try:
        plain = plain_messages([message.model_dump() for message in messages], field=field)
        size = sum(len(message["content"]) for message in plain)
        return await _where_it_fits(size, lambda: words.encode(words.render(plain, template), special=False))
    except BadMessages as bad:
        raise invalid(str(bad), bad.field, code="invalid_value") from None
    except NoTemplate as error:
        if template:
            raise invalid(str(error), "chat_template", code="no_chat_template") from None
        raise invalid(f"{error}; use /v1/completions", field, code="no_chat_template") from None
    except ValueError as refusal:
        raise invalid(f"the model's template refuses them: {refusal}", field) from None


async def _where_it_fits(size: int, work: Callable[[], T]) -> T:
    return work() if size <= _AT_ONCE else await asyncio.to_thread(work)
