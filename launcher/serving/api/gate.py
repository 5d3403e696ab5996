"""What stands before every endpoint: targets, hosts, keys, rates, the size of bodies and the time that they take."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launcher.serving.api.http_checks import AllowedHosts, check_body_allowed, check_target, has_body, network_of
from launcher.serving.api.keys import Keys, Rates
from launcher.serving.api.problems import ApiError

_BODIES_AT_ONCE = 64
"""Largest bodies that may be in memory at the same time."""
_BODIES_OF_ONE = 16
"""Those of one address."""
_SMALL = 1 << 16
"""Bytes of each body that are not counted: ordinary requests get in while others send large ones."""
OPEN_PATHS = frozenset({"/", "/health/live", "/health/ready", "/metrics", "/version", "/openapi.json"})
"""Paths that ask for no key and take no body. Every other path asks for one, whether it exists or not."""


class Gate:
    """An ASGI application around another one.

    Args:
        app: gets requests whose body is there already.
        keys: one of them must be shown.
        hosts: by which names the server may be called where there are no keys.
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
        hosts: AllowedHosts,
        rates: Rates,
        max_body_bytes: int,
        body_s: float,
        reject: Callable[[str], None],
    ) -> None:
        self._app, self._keys, self._hosts, self._rates, self._reject = app, keys, hosts, rates, reject
        self._max_body_bytes, self._body_s = max_body_bytes, body_s
        self._held, self._held_by = 0, Counter[str]()
        """Bytes of bodies in memory, as far as they are counted."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or say why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = network_of(scope["client"][0]) if scope.get("client") else ""
        counted = 0

        def count(size: int) -> None:
            nonlocal counted
            self._count(address, size - _SMALL - counted)
            counted = max(counted, size - _SMALL)

        try:
            headers = dict(scope["headers"])
            self._let_in(headers, scope, address)
            body = await self._body(receive, headers, count) if has_body(headers) else b""
            if body is None:
                return
            await self._app(scope, _after(body, receive), send)
        except ApiError as problem:
            await problem.response()(scope, receive, send)
        finally:
            self._held -= counted
            self._held_by[address] -= counted
            if not self._held_by[address]:
                del self._held_by[address]

    def _let_in(self, headers: dict[bytes, bytes], scope: Scope, address: str) -> None:
        """Look at everything that comes before the body.

        Raises:
            ApiError: the request is not let in.
        """
        check_target(scope["raw_path"])
        is_open = scope["path"] in OPEN_PATHS
        if not self._keys:
            self._hosts.check(headers, http_version=scope["http_version"])
        if not is_open:
            self._check_caller(headers, address)
        check_body_allowed(scope["method"], headers, may=not is_open)

    def _check_caller(self, headers: dict[bytes, bytes], caller: str) -> None:
        closes = has_body(headers)
        if self._keys:
            shown = headers.get(b"authorization", b"").decode("latin-1")
            owner = self._keys.owner(shown)
            if owner is None:
                self._reject("key")
                said = "the key is not valid" if shown else "show a key: Authorization: Bearer KEY"
                raise ApiError(401, said, code="invalid_api_key", closes=closes)
            caller = owner
        if wait_s := self._rates.wait_s(caller):
            self._reject("rate")
            said = "too many requests of this key" if self._keys else "too many requests of this address"
            raise ApiError(429, said, code="rate_limit_exceeded", retry_s=wait_s + 0.5, closes=closes)

    async def _body(self, receive: Receive, headers: dict[bytes, bytes], count: Callable[[int], None]) -> bytes | None:
        """Return the whole body; ``None`` when its client is gone."""
        if int(headers.get(b"content-length", b"0")) > self._max_body_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._max_body_bytes:
                        raise self._too_large()
                    count(len(body))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            self._reject("slow")
            said = f"the body took longer than {self._body_s:g} s to arrive"
            raise ApiError(408, said, code="body_timeout", closes=True) from None

    def _count(self, address: str, more: int) -> None:
        """Count bytes that have come.

        Raises:
            ApiError: there is no room for them.
        """
        if more <= 0:
            return
        if (
            self._held + more > _BODIES_AT_ONCE * self._max_body_bytes
            or self._held_by[address] + more > _BODIES_OF_ONE * self._max_body_bytes
        ):
            self._reject("bodies")
            raise ApiError(503, "too many large requests at once", code="busy", retry_s=2, closes=True)
        self._held += more
        self._held_by[address] += more

    def _too_large(self) -> ApiError:
        self._reject("body")
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
