"""A reverse proxy to another server of this machine; responses are streamed through."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from launcher.inference.server.middleware import CallerShares, caller_of
from launcher.inference.server.protocol import shorten_value
from launcher.inference.server.requests import read_object
from launcher.inference.server.responses import ApiError, invalid

_FORWARDED_HEADERS = frozenset({b"accept", b"content-type", b"user-agent", b"x-request-id"})
_HOP_HEADERS = frozenset({b"connection", b"transfer-encoding", b"keep-alive", b"date", b"server"})
_PROBE_S = 5.0
_URL_FIELDS = frozenset({"url", "image_url", "audio_url", "video_url", "file_url"})
"""Fields of messages, in OpenAI's and Anthropic's formats, whose address vLLM fetches."""
_GENERATION_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"})
ALLOWED_PATHS: Mapping[str, str] = {
    **dict.fromkeys(_GENERATION_PATHS, "POST"),
    **dict.fromkeys(("/tokenize", "/detokenize"), "POST"),
    **dict.fromkeys(("/v1/models", "/metrics", "/version", "/openapi.json"), "GET"),
    **dict.fromkeys(("/health/live", "/health/ready"), "GET"),
}
"""Allowed paths with their method.
vLLM has others, some of which change or end it; they cannot be reached from outside."""


@dataclass(frozen=True, kw_only=True)
class ProxyLimits:
    """Limits of a proxy."""

    capacity: int
    """Sequences that the server behind it processes at a time."""
    max_queue: int
    max_choices: int
    queue_timeout_s: float
    request_timeout_s: float


class Proxy:
    """An ASGI application that forwards requests to another server.

    Args:
        host: of that server.
        port: of that server.
        limits: on numbers and times of requests.
        authorization: header that the other server asks for; that of a client is never forwarded.
    """

    def __init__(self, host: str, port: int, *, limits: ProxyLimits, authorization: str) -> None:
        self._limits = limits
        self._url, self._authorization = f"http://{host}:{port}", authorization.encode()
        # The transport alone, as a client would keep the cookies of one caller for the next. A connection for each
        # request, as an idle one may be closed by the other server just when a request is sent on it.
        self._transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)
        self.is_ready = False
        """Whether the server behind it was healthy at the last probe; set by its monitor."""
        self.draining = False
        self.open_requests = self.num_ended = self.rejected = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._shares = CallerShares(capacity=limits.capacity, max_queue=limits.max_queue)
        self._running = self._num_waiting = 0
        """Sequences that were forwarded, and those that wait."""
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            _check_allowed(scope)
            if scope["path"].startswith("/health/"):
                await self._health(scope["path"], scope, receive, send)
                return
            self._check_open()
            body: bytes = (await receive()).get("body", b"")
            sequences = await self._sequences(scope["path"], body)
            self._check_open()
            await self._forward(scope, receive, send, body, sequences)
        except ApiError as problem:
            await problem.response()(scope, receive, send)

    async def probe(self) -> bool:
        """Return whether the server behind it is healthy."""
        try:
            async with asyncio.timeout(_PROBE_S), aclosing(await self._request("GET", b"/health", [])) as response:
                return response.status_code == 200
        except (httpx.TransportError, TimeoutError):
            return False

    async def close(self) -> None:
        """Close the connections to the server behind it."""
        await self._transport.aclose()

    def cancel_all(self) -> None:
        """Cancel every request without a complete response."""
        for task in self._tasks:
            task.cancel()

    def _check_open(self) -> None:
        if self.draining:
            raise ApiError(503, "the server is ending", code="draining", retry_s=5, closes=True)
        if not self.is_ready:
            raise ApiError(503, "vLLM does not answer yet", code="starting", retry_s=5)

    async def _sequences(self, path: str, body: bytes) -> int:
        """Return how many sequences a request asks for; 0 where it generates nothing.

        Raises:
            ApiError: it asks for too many, or is no JSON.
        """
        if path not in _GENERATION_PATHS:
            return 0
        tree = await read_object(body)
        _check_addresses(tree)
        counts = {name: _sequence_count(tree, name) for name in ("n", "best_of")}
        largest = max(counts, key=lambda name: counts[name])
        count = counts[largest]
        prompt = tree.get("prompt")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            count *= len(prompt)
        if count > self._limits.max_choices:
            said = f"asks for {count:,} sequences at once; this server allows {self._limits.max_choices}"
            raise invalid(said, largest if counts[largest] > 1 else "prompt")
        return count

    async def _acquire(self, sequences: int) -> None:
        """Wait until so many sequences may be forwarded, in the order of arrival.

        Raises:
            ApiError: too many wait, or it takes too long.
        """
        if not sequences or (not self._waiting and self._fits(sequences)):
            self._running += sequences
            return
        if self._num_waiting + sequences > self._limits.max_queue:
            self.rejected += 1
            raise ApiError(429, "too many requests are waiting", code="queue_full", retry_s=2)
        ready = asyncio.get_running_loop().create_future()
        entry = (sequences, ready)
        self._waiting.append(entry)
        self._num_waiting += sequences
        try:
            async with asyncio.timeout(self._limits.queue_timeout_s):
                await ready
        except BaseException as error:
            if ready.done() and not ready.cancelled():
                self._release(sequences)
            else:
                self._waiting.remove(entry)
                self._num_waiting -= sequences
                self._call_next()
            if isinstance(error, TimeoutError):
                self.rejected += 1
                raise ApiError(408, "no engine was free in time", code="queue_timeout", retry_s=5) from None
            raise

    def _release(self, sequences: int) -> None:
        self._running -= sequences
        self._call_next()

    def _call_next(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            sequences, ready = self._waiting.popleft()
            self._num_waiting -= sequences
            self._running += sequences
            ready.set_result(None)

    def _fits(self, sequences: int) -> bool:
        return not self._running or self._running + sequences <= self._limits.capacity

    async def _health(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if path == "/health/live":
            answer = JSONResponse({"status": "live"})
        elif self.is_ready and not self.draining:
            answer = JSONResponse({"status": "ready"})
        else:
            why = "the server is ending" if self.draining else "vLLM does not answer"
            answer = JSONResponse({"status": "not ready", "why": why}, status_code=503)
        await answer(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send, body: bytes, sequences: int) -> None:
        """Forward a request; cancel it when its client disconnects or its deadline passes."""
        answer, caller = _RelayedResponse(send), caller_of(scope)
        if self._shares.exceeds(caller, sequences):
            self.rejected += 1
            raise self._shares.error(retry_s=2)

        async def relay() -> None:
            await self._acquire(sequences)
            try:
                headers = [(name, value) for name, value in scope["headers"] if name in _FORWARDED_HEADERS]
                target = scope["path"].encode() + (b"?" + scope["query_string"] if scope["query_string"] else b"")
                async with aclosing(await self._request(scope["method"], target, headers, body)) as response:
                    await answer.relay(response)
            finally:
                self._release(sequences)

        self.open_requests += 1
        self._shares.acquire(caller, sequences)
        work = asyncio.create_task(relay())
        gone = asyncio.ensure_future(_disconnected(receive))
        self._tasks.add(work)
        try:
            timeout = self._limits.request_timeout_s
            done, _ = await asyncio.wait({work, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                said = "the request took longer than this server allows"
                await answer.fail(ApiError(504, said, code="request_timeout"))
            elif work.cancelled():
                await answer.fail(ApiError(503, "the server is ending", code="draining", retry_s=5, closes=True))
            elif work.done():
                await work
        except httpx.ConnectError:
            await answer.fail(ApiError(503, "vLLM does not answer yet", code="starting", retry_s=5))
        except httpx.TransportError:
            await answer.fail(
                ApiError(502, "vLLM closed the connection before its answer was complete", code="engine_failed")
            )
        finally:
            self.open_requests -= 1
            self._shares.release(caller, sequences)
            self.num_ended += 1
            self._tasks.discard(work)
            for each in (work, gone):
                each.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _request(
        self, method: str, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes = b""
    ) -> httpx.Response:
        """Return the head of a response; its body is read as it arrives."""
        headers = [*headers, (b"authorization", self._authorization), (b"connection", b"close")]
        request = httpx.Request(method, self._url, headers=headers, content=body, extensions={"target": target})
        return await self._transport.handle_async_request(request)


class _RelayedResponse:
    """A response that is relayed to the client.

    Args:
        send: of its request.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_begun = self._is_stream = False

    async def relay(self, response: httpx.Response) -> None:
        """Relay a response, each part as it arrives."""
        headers = [(name, value) for name, value in response.headers.raw if name.lower() not in _HOP_HEADERS]
        self._has_begun = True
        self._is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        await self._send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        async for part in response.aiter_raw():
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)  # others have their turn, and a client that is gone is noticed
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, problem: ApiError) -> None:
        """Report an error: as a status, the last event of a stream, or by closing the connection.

        Raises:
            ApiError: nothing was sent yet.
        """
        if not self._has_begun:
            raise problem
        if self._is_stream:
            event = f"\n\ndata: {json.dumps(problem.body())}\n\ndata: [DONE]\n\n"
            await self._send({"type": "http.response.body", "body": event.encode()})


def _check_allowed(scope: Scope) -> None:
    """Raise for paths and methods that are not forwarded.

    Raises:
        ApiError: no such path here, or another method.
    """
    method, path = scope["method"], scope["path"]
    if path not in ALLOWED_PATHS:
        raise ApiError(
            404, f"{method[:20]} {path[:200]}: Not Found; GET /openapi.json lists the paths of vLLM", code="not_found"
        )
    if method != ALLOWED_PATHS[path]:
        problem = ApiError(405, f"{method[:20]} {path[:200]}: Method Not Allowed")
        problem.headers["allow"] = ALLOWED_PATHS[path]
        raise problem


def _check_addresses(tree: Mapping[str, Any]) -> None:
    """Refuse addresses, which vLLM would fetch: some only this machine can reach.

    Raises:
        ApiError: a message names one.
    """
    pending: list[tuple[str, Any]] = [(name, tree.get(name)) for name in ("messages", "input")]
    while pending:
        place, value = pending.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, held in items:
            if name in _URL_FIELDS and isinstance(held, str) and held[:5].lower() != "data:":
                said = "is an address, and this server fetches nothing from addresses; give a data URL"
                raise invalid(said, f"{place}.{name}"[:200], code="invalid_image")
            if isinstance(held, dict | list):
                pending.append((f"{place}.{name}"[:200], held))


def _sequence_count(tree: Mapping[str, object], name: str) -> int:
    """Return the number of sequences that a field asks for.

    vLLM reads "1000" and 1e3 as numbers too: what is not one is rejected.

    Raises:
        ApiError: it is no whole number of at least 1.
    """
    value = tree.get(name)
    if value is None:
        return 1
    if type(value) is not int or value < 1:
        raise invalid(f"is {shorten_value(value)}; give a whole number of at least 1", name)
    return value


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
