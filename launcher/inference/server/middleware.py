"""Admission before every endpoint: hosts, API keys, rate limits, size and time of bodies."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launcher.config.inference import api_keys_from_environ, api_keys_of_file, validate_api_keys_variable
from launcher.inference.server.http_limits import (
    AllowedHosts,
    TrustedProxies,
    check_body_allowed,
    check_target,
    client_network,
    has_body,
)
from launcher.inference.server.responses import ApiError

_MAX_CALLERS = 10_000


class ApiKeys:
    """The keys of a server, kept as hashes.

    Args:
        keys: in plain text; without any, every client is accepted.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._hashes = [_hash_key(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def owner(self, authorization: str) -> str | None:
        """Return the name of the owner of this header's key; ``None`` if it is not valid.

        Every key is compared with, each in a time that does not depend on how much of it is right.
        """
        scheme, _, shown = authorization.partition(" ")
        found = _hash_key(shown.strip())
        known = [hmac.compare_digest(found, each) for each in self._hashes]
        return found.hex()[:16] if any(known) and scheme.lower() == "bearer" else None


def read_api_keys(file: str | None, environ: Mapping[str, str]) -> ApiKeys:
    """Return the keys of a file, one a line, and of the environment, with commas between.

    Raises:
        ConfigError: the file or the variable holds no key, which must not mean that everyone is served, or one that no
            client can send.
    """
    for problem in validate_api_keys_variable(environ):
        raise problem
    return ApiKeys((() if file is None else api_keys_of_file(file)) + api_keys_from_environ(environ))


class RateLimiter:
    """A bucket for each caller that fills at a steady rate and holds a minute's worth.

    Args:
        per_minute: requests; ``None`` sets no limit.
        now: the clock.
    """

    def __init__(self, per_minute: int | None, *, now: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._now = per_minute, now
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: str) -> float:
        """Count a request of ``caller``; return 0 if allowed, else the seconds to wait."""
        if self._per_minute is None:
            return 0.0
        now, rate = self._now(), self._per_minute / 60.0
        left, at = self._buckets.pop(caller, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - at) * rate)
        wait_s = 0.0 if left >= 1.0 else (1.0 - left) / rate
        self._buckets[caller] = (left - (wait_s == 0.0), now)
        while len(self._buckets) > _MAX_CALLERS:
            self._buckets.popitem(last=False)
        return wait_s


_CALLER = "launcher.caller"
"""Entry of a scope: the owner of its key, or its address."""
_SHARE_OF_QUEUE = 0.75


def caller_of(scope: Scope) -> str:
    """Return the name of who sent an admitted request; empty where nothing named one."""
    return str(scope.get(_CALLER, ""))


class CallerShares:
    """Sequences of each caller, who leaves a quarter of the queue to others.

    Args:
        capacity: sequences that engines work on at a time.
        max_queue: sequences that may wait.
    """

    def __init__(self, *, capacity: int, max_queue: int) -> None:
        self._share = capacity + math.ceil(_SHARE_OF_QUEUE * max_queue)
        self._held = Counter[str]()

    def exceeds(self, caller: str, sequences: int) -> bool:
        """Return whether a caller would hold more than its share; a first request is of any size."""
        return bool(caller) and 0 < self._held[caller] > self._share - sequences

    def acquire(self, caller: str, sequences: int) -> None:
        """Count sequences of a request, until it is over."""
        self._held[caller] += sequences

    def release(self, caller: str, sequences: int) -> None:
        """Count them no more."""
        self._held[caller] -= sequences
        if not self._held[caller]:
            del self._held[caller]

    def error(self, *, retry_s: float) -> ApiError:
        """Return the response to a request beyond the share."""
        said = f"{self._share} sequences of this client are running or waiting: the rest of the queue is for others"
        return ApiError(429, said, code="queue_full", retry_s=retry_s)


def _hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


_MAX_BODIES = 64
"""Largest bodies that may be in memory at the same time."""
_MAX_BODIES_PER_CLIENT = 16
"""Those of one address."""
_SMALL_BODY_BYTES = 1 << 16
"""Uncounted bytes of each body, so that ordinary requests pass while others send large ones."""
OPEN_PATHS = frozenset({"/", "/health/live", "/health/ready", "/metrics", "/version", "/openapi.json"})
"""Paths without a key and without a body.
Every other path asks for a key, whether it exists or not."""


class AdmissionMiddleware:
    """An ASGI application around another one.

    Args:
        app: gets requests whose body is there already.
        keys: one of them must be shown.
        hosts: by which names the server may be called where there are no keys.
        proxies: load balancers that name their clients.
        rates: how often each key, or address, may ask.
        max_body_bytes: of one request.
        body_timeout_s: time that a body gets to arrive.
        reject: called with the reason of each rejected request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        hosts: AllowedHosts,
        proxies: TrustedProxies,
        rates: RateLimiter,
        max_body_bytes: int,
        body_timeout_s: float,
        reject: Callable[[str], None],
    ) -> None:
        self._app, self._keys, self._hosts, self._rates, self._reject = app, keys, hosts, rates, reject
        self._proxies = proxies
        self._max_body_bytes, self._body_timeout_s = max_body_bytes, body_timeout_s
        self._body_bytes, self._body_bytes_by_client = 0, Counter[str]()
        """Bytes of bodies in memory, as far as they are counted."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or say why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = client_network(
            self._proxies.client(scope["client"][0], scope["headers"]) if scope.get("client") else ""
        )
        counted = 0

        def count(size: int) -> None:
            nonlocal counted
            self._count(address, size - _SMALL_BODY_BYTES - counted)
            counted = max(counted, size - _SMALL_BODY_BYTES)

        try:
            headers = dict(scope["headers"])
            self._check_head(headers, scope, address)
            body = await self._body(receive, headers, count) if has_body(headers) else b""
            if body is None:
                return
            await self._app(scope, _after(body, receive), send)
        except ApiError as problem:
            await problem.response()(scope, receive, send)
        finally:
            self._body_bytes -= counted
            self._body_bytes_by_client[address] -= counted
            if not self._body_bytes_by_client[address]:
                del self._body_bytes_by_client[address]

    def _check_head(self, headers: dict[bytes, bytes], scope: Scope, address: str) -> None:
        """Look at everything that comes before the body.

        Raises:
            ApiError: the request is not let in.
        """
        check_target(scope["raw_path"])
        is_open = scope["path"] in OPEN_PATHS
        if not self._keys:
            self._hosts.check(headers, http_version=scope["http_version"])
        if not is_open:
            scope[_CALLER] = self._check_caller(headers, address)
        check_body_allowed(scope["method"], headers, may=not is_open)

    def _check_caller(self, headers: dict[bytes, bytes], caller: str) -> str:
        closes = has_body(headers)
        if self._keys:
            shown = headers.get(b"authorization", b"").decode("latin-1")
            owner = self._keys.owner(shown)
            if owner is None:
                self._reject("key")
                said = "the key is not valid" if shown else "send an API key: Authorization: Bearer KEY"
                raise ApiError(401, said, code="invalid_api_key", closes=closes)
            caller = owner
        if wait_s := self._rates.wait_s(caller):
            self._reject("rate")
            said = "too many requests with this key" if self._keys else "too many requests from this address"
            raise ApiError(429, said, code="rate_limit_exceeded", retry_s=wait_s + 0.5, closes=closes)
        return caller

    async def _body(self, receive: Receive, headers: dict[bytes, bytes], count: Callable[[int], None]) -> bytes | None:
        """Return the whole body; ``None`` when its client is gone."""
        if int(headers.get(b"content-length", b"0")) > self._max_body_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_timeout_s):
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
            said = f"the body took longer than {self._body_timeout_s:g} s to arrive"
            raise ApiError(408, said, code="body_timeout", closes=True) from None

    def _count(self, address: str, more: int) -> None:
        """Count bytes that have come.

        Raises:
            ApiError: there is no room for them.
        """
        if more <= 0:
            return
        if (
            self._body_bytes + more > _MAX_BODIES * self._max_body_bytes
            or self._body_bytes_by_client[address] + more > _MAX_BODIES_PER_CLIENT * self._max_body_bytes
        ):
            self._reject("bodies")
            raise ApiError(503, "too many large requests at once", code="busy", retry_s=2, closes=True)
        self._body_bytes += more
        self._body_bytes_by_client[address] += more

    def _too_large(self) -> ApiError:
        self._reject("body")
        said = f"the body is larger than the {self._max_body_bytes:,} bytes that this server accepts"
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
