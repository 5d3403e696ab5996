"""Prompts to tokens, off the event loop where there is much of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from launcher.serving.api.bodies import Message
from launcher.serving.api.problems import invalid
from launcher.serving.chat import BadMessages, NoTemplate, plain_messages
from launcher.serving.words import Words

T = TypeVar("T")
_AT_ONCE = 2000
"""Characters that are tokenised in well under a millisecond."""
_LARGE = 1 << 16
"""Characters whose tokens take tens of megabytes meanwhile; texts of more are tokenised one after the other."""
_OF_MESSAGE = 100
"""Characters that a template spends on a message, by the time that this takes."""

_pool = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
_pool_of_large = ThreadPoolExecutor(1, thread_name_prefix="tokenize-large")

Prompts = str | list[int] | list[str] | list[list[int]]


async def encode_all(words: Words, prompt: Prompts, *, context: int) -> list[list[int]]:
    """Return the tokens of every prompt.

    Raises:
        ApiError: a token that the tokenizer does not have, or a text that is too long whatever its tokens are.
    """
    if isinstance(prompt, str):
        prompt = [prompt]
    texts = [each for each in prompt if isinstance(each, str)]
    if texts:
        most = words.most_characters(context)
        if (longest := max(map(len, texts))) > most:
            said = f"has {longest:,} characters, and no text of more than {most:,} fits into {context:,} tokens"
            raise invalid(said, "prompt", code="context_length_exceeded")
        return await _where_it_fits(sum(map(len, texts)), lambda: words.encode_all(texts))
    lists = [each for each in prompt if isinstance(each, list)] or [[each for each in prompt if isinstance(each, int)]]
    for ids in lists:
        if (largest := max(ids)) >= words.vocab_size:
            raise invalid(f"token {largest} is not in the vocabulary of {words.vocab_size}", "prompt")
    return lists


async def encode(words: Words, text: str, *, special: bool = True) -> list[int]:
    """Return the tokens of a text."""
    return (await _where_it_fits(len(text), lambda: words.encode_all([text], special=special)))[0]


async def decode(words: Words, ids: Sequence[int]) -> str:
    """Return the text of tokens."""
    return await _where_it_fits(len(ids), lambda: words.decode(ids))


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
        size = sum(len(message["content"]) for message in plain) + _OF_MESSAGE * len(plain)
        return await _where_it_fits(size, lambda: words.encode_all([words.render(plain, template)], special=False)[0])
    except BadMessages as bad:
        raise invalid(str(bad), bad.field, code="invalid_value") from None
    except NoTemplate as error:
        if template:
            raise invalid(str(error), "chat_template", code="no_chat_template") from None
        raise invalid(f"{error}; use /v1/completions", field, code="no_chat_template") from None
    except ValueError as refusal:
        raise invalid(f"the model's template refuses them: {refusal}", field) from None


async def _where_it_fits(size: int, work: Callable[[], T]) -> T:
    """Return what ``work`` returns, done by a thread where it takes long; it should let go of the interpreter."""
    if size <= _AT_ONCE:
        return work()
    pool = _pool if size <= _LARGE else _pool_of_large
    return await asyncio.get_running_loop().run_in_executor(pool, work)
