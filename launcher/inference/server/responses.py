"""Error responses in OpenAI's shape, and server-sent events that notice a disconnect."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from launcher.inference.engine.base import InvalidRequest
from launcher.inference.server.protocol import (
    RequestBody,
    endpoint_that_takes,
    logprobs_of_endpoints,
    shorten_value,
    unknown_field,
)
from launcher.inference.server.request_state import DeadlineExceeded, GenerationFailed, ServerDraining


class ApiError(Exception):
    """An error response.

    Args:
        status: of HTTP.
        message: for the client.
        param: the field that is wrong, if one is.
        code: for programs, as OpenAI has it.
        retry_s: when to come back, where that helps.
        closes: whether the connection cannot be used any more.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: float | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_s is None else {"retry-after": str(max(1, round(retry_s)))}
        if closes:
            self.headers["connection"] = "close"
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    @property
    def kind(self) -> str:
        """The error's type in OpenAI's terms."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """Return the body, or the data of an event."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def invalid(message: str, param: str, *, code: str = "invalid_value") -> ApiError:
    """Return the response to a request whose ``param`` is invalid."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def validation_error(error: ValidationError, body_type: type[RequestBody]) -> ApiError:
    """Return the response to an invalid body, naming its first error.

    A field of another endpoint comes first: such a request also lacks required fields of this one.
    """
    errors = error.errors(include_url=False)
    elsewhere = (each for each in errors if endpoint_that_takes(str(each["loc"][0] if each["loc"] else ""), body_type))
    first = next(elsewhere, errors[0])
    name, kind = ".".join(map(str, first["loc"])), first["type"]
    if kind == "extra_forbidden":
        name = name[:100]
        said = unknown_field(first["loc"], body_type)
        return ApiError(400, f"{name or repr(name)}: {said}", param=name, code="unsupported_field")
    said, code = explain_validation(first)
    if kind in ("int_type", "bool_type"):
        said += logprobs_of_endpoints(name, body_type)
    return ApiError(400, f"{name}: {said}" if name else f"the body {said}", param=name or None, code=code)


_FORMS = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "string_type": "a text",
}
"""Description of a field's type, by the kind of error."""
_UNSUPPORTED_VALUES = frozenset({"tool", "function", "json_object", "json_schema"})
"""OpenAI values of ``role`` and ``response_format.type`` that are not supported."""


def explain_validation(error: ErrorDetails) -> tuple[str, str]:
    """Return what is wrong with one value, in the style of other errors, and the error code."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    shown = shorten_value(value)
    if kind == "missing":
        return "is missing, and this field must have a value", "invalid_value"
    if value is None and error["loc"] and kind in (*_FORMS, "literal_error"):
        return "is null, and this field must have a value", "invalid_value"
    if kind in _FORMS:
        return f"is {shown}; give {_FORMS[kind]}", "invalid_value"
    match kind, context:
        case "invalid_value" | "context_length_exceeded", {"message": str(message)}:
            return message, kind
        case "literal_error", {"expected": expected}:
            is_unsupported = isinstance(value, str) and value in _UNSUPPORTED_VALUES
            said = f"is {shown}{', which this server does not support' if is_unsupported else ''}; give {expected}"
            return said, "unsupported_value" if is_unsupported else "invalid_value"
        case "greater_than", {"gt": limit}:
            said = f"is {shown}; give a number above {limit:g}"
        case "greater_than_equal", {"ge": limit}:
            said = f"is {shown}; give a number of at least {_in_digits(limit)}"
        case "less_than_equal", {"le": limit}:
            said = f"is {shown}; give a number of at most {_in_digits(limit)}"
        case "too_short", {"min_length": limit, "actual_length": length}:
            said = f"{f'has {length} elements' if length else 'is an empty list'}; give at least {limit}"
        case "too_long", {"max_length": limit}:
            said = f"has {len(value):,} elements; at most {limit:,} are allowed"
        case "string_too_short", {"min_length": limit}:
            said = f"has {len(value)} characters; give at least {limit}"
        case "string_too_long", {"max_length": limit}:
            said = f"has {len(value):,} characters; at most {limit:,} are allowed"
        case _:
            said = f"is {shown}, which this field does not take"
    return said, "invalid_value"


def _in_digits(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def failure_error(error: Exception, *, prompt_field: str) -> ApiError:
    """Return the response for the error that ended a sequence."""
    match error:
        case ApiError():
            return error
        case InvalidRequest(param=param):
            name = prompt_field if param == "prompt" else param
            return invalid(str(error), name, code="unsupported_value")
        case DeadlineExceeded(while_queued=True):
            return ApiError(408, "no engine was free in time", code="queue_timeout", retry_s=5)
        case DeadlineExceeded():
            return ApiError(504, "the request took longer than this server allows", code="request_timeout")
        case ServerDraining():
            return ApiError(503, "the server is ending", code="draining", retry_s=5, closes=True)
        case GenerationFailed():
            return ApiError(500, str(error), code="engine_failed")
    raise error


def as_headers(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return headers as ASGI has them."""
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


STREAM_KEEP_ALIVE_S = 5.0
"""Interval of a comment in a stream, so that no proxy closes one that waits."""
EventData = dict[str, Any]


async def run_until_disconnect(request: Request, work: Awaitable[Response]) -> Response:
    """Return the response of ``work``; cancel it when the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        return Response(status_code=499)  # the client is gone
    finally:
        for each in (task, gone):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await each


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(EventSourceResponse):
    """Server-sent events, each the JSON of one object, ``[DONE]`` at the end.

    What goes wrong before the first event is an ordinary answer with its status; later it is an event.

    Args:
        events: the objects.
        explain: the error that a client gets for an exception.
        on_end: called when it is over, whatever has happened.
        headers: besides those of a stream.
    """

    def __init__(
        self,
        events: AsyncGenerator[EventData],
        *,
        explain: Callable[[Exception], ApiError],
        on_end: Callable[[], None],
        headers: dict[str, str],
    ) -> None:
        super().__init__(
            self._encode(events),
            headers={"cache-control": "no-cache", **headers},
            ping=STREAM_KEEP_ALIVE_S,
            ping_message_factory=lambda: ServerSentEvent(comment="waiting", sep="\n"),
        )
        self._events, self._explain, self._on_end = events, explain, on_end
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the last event, or until the client disconnects."""
        head: Message = {}
        beginning = asyncio.Lock()

        async def send_late(message: Message) -> None:
            """Send the head with the first bytes, so that an error before them has a status."""
            nonlocal head
            if message["type"] == "http.response.start":
                head = message
                return
            async with beginning:  # a keep-alive may come together with the first event
                if not self._has_begun:
                    self._has_begun = True
                    await send(head)
            await send(message)

        try:
            await super().__call__(scope, receive, send_late)
        except ApiError as problem:
            await problem.response()(scope, receive, send)
        finally:
            try:
                await self._events.aclose()
            finally:
                self._on_end()

    async def _encode(self, events: AsyncGenerator[EventData]) -> AsyncGenerator[bytes]:
        try:
            async for data in events:
                yield _event(json.dumps(data, ensure_ascii=False, separators=(",", ":")))
                await asyncio.sleep(0)  # a kept result comes without a wait: others have their turn
        except Exception as error:
            problem = self._explain(error)
            if not self._has_begun:
                raise problem from error
            yield _event(json.dumps(problem.body(), ensure_ascii=False))
        yield _event("[DONE]")


def _event(text: str) -> bytes:
    return f"data: {text}\n\n".encode()
