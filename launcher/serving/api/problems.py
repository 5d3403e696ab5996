"""What a client is told when something is wrong: OpenAI's shape, with the field and a status that say who is to act."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from launcher.serving.front.flight import Draining, Failed, TooLate
from launcher.serving.values import Refused

FIELDS = {
    "no_repeat_ngram": "no_repeat_ngram_size",
    "bias": "logit_bias",
    "ignore_end": "ignore_eos",
    "beams": "num_beams",
}
"""Fields of ``Sampling`` by what clients call them, where that differs."""


class ApiError(Exception):
    """An answer that is not what was asked for.

    Args:
        status: of HTTP.
        message: for who sent the request.
        param: the field that is wrong, if one is.
        code: for programs.
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


def invalid(message: str, param: str, *, code: str | None = None) -> ApiError:
    """Return the answer to a request whose ``param`` cannot be."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def of_validation(error: ValidationError) -> ApiError:
    """Return the answer to a body that is not one, naming the first thing that is wrong."""
    first = error.errors(include_url=False, include_context=False)[0]
    name, kind = ".".join(map(str, first["loc"])), first["type"]
    if kind == "extra_forbidden":
        name = name[:100]
        return ApiError(400, f"{name}: this server has no such field", param=name, code="unsupported_field")
    said = (
        "is null, and this field must have a value"
        if first["input"] is None and name
        else first["msg"].replace(" after validation", "")
    )
    code = kind if kind == "context_length_exceeded" else "invalid_value"
    return ApiError(400, f"{name}: {said}" if name else f"the body {said}", param=name or None, code=code)


def of_trouble(trouble: Exception, *, prompt_field: str) -> ApiError:
    """Return the answer where a sequence got no result."""
    match trouble:
        case ApiError():
            return trouble
        case Refused(field=field):
            name = prompt_field if field == "prompt" else FIELDS.get(field, field)
            return invalid(str(trouble), name, code="unsupported_value")
        case TooLate(while_queued=True):
            return ApiError(408, "no engine was free in time", code="queue_timeout", retry_s=5)
        case TooLate():
            return ApiError(504, "the request took longer than this server allows", code="request_timeout")
        case Draining():
            return ApiError(503, "the server is ending", code="draining", retry_s=5, closes=True)
        case Failed():
            return ApiError(500, str(trouble), code="engine_failed")
    raise trouble


def as_headers(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return headers as ASGI has them."""
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
