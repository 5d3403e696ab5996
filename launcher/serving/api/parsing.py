"""JSON bodies, parsed, validated and written with bounded work: none may hold up other requests.

The time that a parser takes depends on the number of values, not on the number of bytes: two megabytes of brackets take
a second, two megabytes of text two milliseconds. So values are counted before they are parsed, and lists are limited
before their items are validated.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from launcher.serving.api.bodies import Body, Bounds
from launcher.serving.api.problems import ApiError, of_validation

B = TypeVar("B", bound=Body)

MAX_VALUES = 1 << 18
"""Commas outside of strings: values of lists and objects in a body. They are parsed in some 20 ms."""
MAX_CONTAINERS = 1 << 14
"""Lists and objects in a body."""
MAX_NAMES = 1 << 14
"""Fields of all objects in a body."""
SLICE = 64
"""Elements of a long list that are written before other requests have their turn."""
_AT_ONCE = 1 << 14
"""Bytes of a body that is parsed in a millisecond, whatever it holds."""
_num_waiting = 0
"""Large bodies that have come and are not parsed."""
_DEPTH = 4
"""Where answers have their long lists: choices, choice, logprobs, list."""
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{,:]', re.DOTALL)
"""A string, with an end or without one, or a character that begins or separates values. It never backtracks."""


async def parse(body_type: type[B], data: bytes, bounds: Bounds) -> B:
    """Return the body that ``data`` holds.

    Args:
        body_type: what it should be.
        data: its JSON.
        bounds: lengths that this server takes.

    Raises:
        ApiError: it holds none; the message names the field.
    """
    async with _in_turn(data):
        tree = await _parse_object(data)
        try:
            with _without_collections():
                return body_type.model_validate(tree, context=bounds)
        except ValidationError as error:
            raise of_validation(error) from None


async def read_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object that ``data`` holds.

    Raises:
        ApiError: it holds none, or too many values.
    """
    async with _in_turn(data):
        return await _parse_object(data)


@contextlib.asynccontextmanager
async def _in_turn(data: bytes) -> AsyncIterator[None]:
    """Let the event loop go round once for every large body that waits: it would parse all of them at a stretch."""
    global _num_waiting
    if len(data) > _AT_ONCE:
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
    """Whether there may be too many values; characters in strings count too, so this is a quick upper bound."""
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
    elif isinstance(value, list) and value and depth < _DEPTH and len(value) <= SLICE:
        for at, each in enumerate(value):
            parts.append("," if at else "[")
            await _encode(each, parts, depth=depth + 1)
        parts.append("]")
    elif isinstance(value, list) and len(value) > SLICE:
        for start in range(0, len(value), SLICE):
            parts.append(("," if start else "[") + _dumps(value[start : start + SLICE])[1:-1])
            await asyncio.sleep(0)
        parts.append("]")
    else:
        parts.append(_dumps(value))


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
