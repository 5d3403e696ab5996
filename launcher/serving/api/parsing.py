"""JSON bodies, parsed and validated with bounded work: no body may hold up other requests.

The time that a parser takes depends on the number of values, not on the number of bytes: two megabytes of brackets take
a second, two megabytes of text two milliseconds. So values are counted before they are parsed, and lists are limited
before their items are validated.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
from collections.abc import Iterator
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
    tree = await read_object(data)
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
