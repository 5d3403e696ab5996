"""Values on their way between the front and an engine: JSON behind four bytes of length. Nothing is unpickled."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, fields
from typing import Any

from launcher.serving.values import Request, Sampling, Stats, Token, Update

LENGTH = struct.Struct("<I")
MAX_BYTES = 1 << 28
"""A longer frame can only be a mistake."""

Message = dict[str, Any]


def pack(message: Message) -> bytes:
    """Return one frame."""
    payload = json.dumps(message, separators=(",", ":")).encode()
    assert len(payload) <= MAX_BYTES, "bodies are limited long before"
    return LENGTH.pack(len(payload)) + payload


def unpack(payload: bytes) -> Message:
    """Return the message of a frame without its length."""
    message: Message = json.loads(payload)
    return message


def request_to_wire(request: Request) -> Message:
    """Return a request as plain values."""
    return asdict(request)


def request_from_wire(tree: Message) -> Request:
    """Return the request that ``request_to_wire`` took apart."""
    sampling = dict(tree["sampling"])
    sampling["bias"] = tuple((int(token), float(value)) for token, value in sampling["bias"])
    sampling["stop_ids"] = tuple(sampling["stop_ids"])
    return Request(**{**tree, "prompt": tuple(tree["prompt"]), "sampling": Sampling(**sampling)})


def update_to_wire(update: Update) -> list[Any]:
    """Return an update as a short list: there is one for each running request and step."""
    plain = all(token.logprob is None and not token.top for token in update.tokens)
    tokens = [token.id if plain else [token.id, token.logprob, token.top] for token in update.tokens]
    return [update.request, tokens, update.finish, update.problem, update.field, update.cached_tokens]


def update_from_wire(row: list[Any]) -> Update:
    """Return the update that ``update_to_wire`` took apart."""
    request, tokens, finish, problem, field, cached = row
    return Update(
        request=request,
        tokens=tuple(map(_token, tokens)),
        finish=finish,
        problem=problem,
        field=field,
        cached_tokens=cached,
    )


def stats_to_wire(stats: Stats) -> list[Any]:
    """Return the numbers in the order of their fields."""
    return [getattr(stats, field.name) for field in fields(Stats)]


def stats_from_wire(row: list[Any]) -> Stats:
    """Return the numbers by name again."""
    return Stats(**{field.name: value for field, value in zip(fields(Stats), row, strict=True)})


def _token(value: Any) -> Token:
    if isinstance(value, int):
        return Token(id=value)
    number, logprob, top = value
    return Token(id=number, logprob=logprob, top=tuple((token, score) for token, score in top))
