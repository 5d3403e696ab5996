"""One choice of an answer as it comes: pieces of text with the tokens that they are made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from launcher.serving.front.flight import Flight
from launcher.serving.text import TextOf
from launcher.serving.values import Token
from launcher.serving.words import Words

_AHEAD = 64
"""Pieces that are there before their reader asks for them."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some more of a choice."""

    text: str
    tokens: tuple[Token, ...]
    """Tokens since the last piece; their characters may be in the next one."""
    finish: str | None = None
    """Set in the last piece."""


async def pieces_of(flight: Flight, words: Words, stops: Sequence[str], *, echo: bool = False) -> AsyncGenerator[Piece]:
    """Yield what can be shown of a sequence; where a string ends its text, end the sequence.

    Args:
        flight: brings the tokens.
        words: the tokenizer.
        stops: strings that end the text.
        echo: whether the text begins with the prompt's, as one text: each alone may lose a space between them.

    Raises:
        Exception: why there is no result.
    """
    text = TextOf(words.decode, stops, before=flight.request.prompt if echo else ())
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
                yield Piece(text=before + shown, tokens=tuple(pending), finish="stop")
                return
            if shown:
                yield Piece(text=before + shown, tokens=tuple(pending))
                before, pending = "", []
    rest = before + text.rest()
    finish = "stop" if text.stopped is not None else flight.finish
    yield Piece(text=rest, tokens=tuple(pending), finish=finish)


async def merged(sources: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
    """Yield the pieces of all sources with their source's number, as they come.

    Raises:
        Exception: the first that a source raised; the others are ended.
    """
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue(_AHEAD)

    async def carry(number: int, source: AsyncGenerator[Piece]) -> None:
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
