"""What stands before every endpoint: keys, rates, the size of bodies and the time that they take to arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launcher.serving.api.keys import Keys, Rates
from launcher.serving.api.problems import ApiError

_BODIES_AT_ONCE = 64
"""Largest bodies that may be in memory at the same time."""
_GUARDED = ("/v1/", "/tokenize", "/detokenize")
"""Paths that ask for a key; the page, health and metrics do not."""


class Gate:
    """An ASGI application around another one.

    Args:
        app: gets requests whose body is there already.
        keys: one of them must be shown.
        rates: how often each key, or address, may ask.
        max_body_bytes: of one request.
        body_s: time that a body gets to arrive.
        reject: called with the reason whenever somebody is turned away.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        rates: Rates,
        max_body_bytes: int,
        body_s: float,
        reject: Callable[[str], None],
    ) -> None:
        self._app, self._keys, self._rates, self._reject = app, keys, rates, reject
        self._max_body_bytes, self._body_s, self._held = max_body_bytes, body_s, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or say why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0
        try:
            headers = dict(scope["headers"])
            if scope["path"].startswith(_GUARDED):
                self._let_in(headers, scope)
            room = self._room_for(headers)
            self._held += room
            size = room
            body = await self._body(receive)
            if body is None:
                return
            self._held += len(body) - size
            size = len(body)
            await self._app(scope, _after(body, receive), send)
        except ApiError as problem:
            await problem.response()(scope, receive, send)
        finally:
            self._held -= size

    def _let_in(self, headers: dict[bytes, bytes], scope: Scope) -> None:
        caller = scope["client"][0] if scope.get("client") else ""
        if self._keys:
            shown = headers.get(b"authorization", b"").decode("latin-1")
            owner = self._keys.owner(shown)
            if owner is None:
                self._reject("key")
                said = "the key is not valid" if shown else "show a key: Authorization: Bearer KEY"
                raise ApiError(401, said, code="invalid_api_key", closes=True)
            caller = owner
        if wait_s := self._rates.wait_s(caller):
            self._reject("rate")
            said = "too many requests of this key" if self._keys else "too many requests of this address"
            raise ApiError(429, said, code="rate_limit_exceeded", retry_s=wait_s + 0.5, closes=True)

    def _room_for(self, headers: dict[bytes, bytes]) -> int:
        """Return the bytes that a body may take, as far as its headers tell."""
        length = headers.get(b"content-length")
        if length is None and b"transfer-encoding" not in headers:
            return 0
        size = int(length) if length is not None and length.isdigit() else self._max_body_bytes
        if size > self._max_body_bytes:
            self._reject("body")
            raise self._too_large()
        if self._held + size > _BODIES_AT_ONCE * self._max_body_bytes:
            self._reject("bodies")
            raise ApiError(503, "too many large requests at once", code="busy", retry_s=2, closes=True)
        return size

    async def _body(self, receive: Receive) -> bytes | None:
        """Return the whole body; ``None`` when its client is gone."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_body_bytes:
                        self._reject("body")
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            self._reject("slow")
            said = f"the body took longer than {self._body_s:g} s to arrive"
            raise ApiError(408, said, code="body_timeout", closes=True) from None

    def _too_large(self) -> ApiError:
        said = f"the body is larger than the {self._max_body_bytes:,} bytes that this server takes"
        return ApiError(413, said, code="body_too_large", closes=True)


def _after(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the body first, and then waits for the client to go."""
    given = False

    async def give() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return give
