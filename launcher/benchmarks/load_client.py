"""Client of OpenAI-compatible servers on asyncio: one request, one stream.

A client library would take a multiple of the processor time, on the very cores whose work is measured.

Standard library alone, so that it runs beside what it measures.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.config.benchmark.serving import LoadRequest, ServerAddress

_LIMIT = 1 << 20
"""Longest line and header, in bytes."""


@dataclass(slots=True)
class RequestOutcome:
    """The outcome of one request; times are seconds since the start of the load."""

    number: int
    """Index of the request, from 0, in the order in which requests were due."""
    due_s: float
    """Time at which the request was due.
    Latencies count from here, so a stalled server cannot hide its delay."""
    sent_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    """When each chunk with text arrived."""
    end_s: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    """Tokens of the answer as the server reports them, otherwise one for each chunk."""
    error: str = ""
    """Empty, or ``connect``, ``cut``, ``timeout``, ``frame``, ``unfinished`` or a status (429)."""
    why: str = ""
    text: str = ""
    """The answer, if ``LoadTarget.keep_text`` is set."""
    finish: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the whole answer arrived."""
        return not self.error

    @property
    def ttft_s(self) -> float:
        """Time to first token, in seconds."""
        return self.chunks_s[0] - self.due_s

    @property
    def e2el_s(self) -> float:
        """End-to-end latency, in seconds."""
        return self.end_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, in seconds; ``None`` for a single token."""
        return (self.chunks_s[-1] - self.chunks_s[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def itl_s(self) -> list[float]:
        """Latencies between consecutive chunks, in seconds."""
        return [after - before for before, after in zip(self.chunks_s, self.chunks_s[1:], strict=False)]


class RequestError(Exception):
    """The server could not be reached, or it closed the connection.

    ``kind`` is the word that errors are counted by.
    """

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(f"{kind}: {why}")
        self.kind = kind


class HttpResponse:
    """Status and headers of a response, and its body in pieces."""

    def __init__(self, reader: asyncio.StreamReader, status: int, headers: Mapping[str, str]) -> None:
        self._reader, self.status, self._headers = reader, status, headers
        self.is_whole = False
        """Whether the whole body was read, so that the connection can be reused."""

    @property
    def keeps(self) -> bool:
        """Whether the connection can be reused."""
        return self.is_whole and self._headers.get("connection", "").lower() != "close"

    async def body(self) -> bytes:
        """Return the whole body."""
        return b"".join([piece async for piece in self.pieces()])

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the pieces of the body as they arrive.

        Raises:
            RequestError: the connection was cut.
        """
        try:
            if self._headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int((await self._reader.readline()).split(b";")[0].strip() or b"-1", 16):
                    if size < 0:
                        raise RequestError("cut", "the connection ended inside an answer")
                    yield (await self._reader.readexactly(size + 2))[:-2]
                await self._reader.readline()
            elif "content-length" in self._headers:
                yield await self._reader.readexactly(int(self._headers["content-length"]))
            else:
                while piece := await self._reader.read(_LIMIT):
                    yield piece
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            raise RequestError("cut", str(error)) from error
        self.is_whole = True


class HttpConnection:
    """One connection, opened at the first request and reopened after the server closed it."""

    def __init__(self, address: ServerAddress, *, headers: Mapping[str, str]) -> None:
        self._address = address
        lines = {"Host": f"{address.host}:{address.port}", "Content-Type": "application/json", **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def get(self, path: str) -> HttpResponse:
        """Send a GET request; see ``post``."""
        return await self._ask("GET", path, b"")

    async def post(self, path: str, body: bytes) -> HttpResponse:
        """Send a POST request and return the response once its headers have arrived.

        Raises:
            RequestError: the server does not respond.
        """
        return await self._ask("POST", path, body)

    async def _ask(self, method: str, path: str, body: bytes) -> HttpResponse:
        is_kept = self._writer is not None
        try:
            return await self._once(method, path, body)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            self.close()
            if not is_kept:
                raise RequestError("connect", str(error) or type(error).__name__) from error
        try:  # the server may close an idle connection
            return await self._once(method, path, body)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            self.close()
            raise RequestError("connect", str(error) or type(error).__name__) from error

    async def _once(self, method: str, path: str, body: bytes) -> HttpResponse:
        if self._writer is None or self._reader is None:
            host, port = self._address.host, self._address.port
            self._reader, self._writer = await asyncio.open_connection(host, port, limit=_LIMIT)
        head = f"{method} {self._address.prefix}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin1").split("\r\n")
        fields = (line.partition(":") for line in lines[1:] if line)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        return HttpResponse(self._reader, int(lines[0].split()[1]), headers)

    def close(self) -> None:
        """Abort the connection, as a client does that disappears."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None


_SHOWN = 300


@dataclass(frozen=True, kw_only=True)
class LoadTarget:
    """The server that requests go to, and the fields they share."""

    address: ServerAddress
    model: str
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Fields added to every body; those of the request itself take precedence."""
    key: str = ""
    """API key; empty sends none."""
    timeout_s: float = 600.0
    """Time limit of a whole request."""
    keep_text: bool = False
    """Whether outcomes keep the text of the answer."""

    def connection(self) -> HttpConnection:
        """Return a new connection, not open yet."""
        return HttpConnection(self.address, headers={"Authorization": f"Bearer {self.key}"} if self.key else {})

    def encode(self, request: LoadRequest) -> tuple[str, bytes]:
        """Return the path and the body of a request."""
        path = "/v1/chat/completions" if "messages" in request.fields else "/v1/completions"
        body = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            **self.extra_body,
            **request.fields,
        }
        return path, json.dumps({name: value for name, value in body.items() if value is not None}).encode()


class ConnectionPool:
    """Idle connections that are kept for later requests."""

    def __init__(self, target: LoadTarget) -> None:
        self.target = target
        self._idle: list[HttpConnection] = []

    def acquire(self) -> HttpConnection:
        """Return an idle connection, or a new one."""
        return self._idle.pop() if self._idle else self.target.connection()

    def release(self, connection: HttpConnection) -> None:
        """Keep a connection for a later request."""
        self._idle.append(connection)

    def close(self) -> None:
        """Close idle connections."""
        for connection in self._idle:
            connection.close()


async def send_request(
    request: LoadRequest, outcome: RequestOutcome, pool: ConnectionPool, *, start: float
) -> RequestOutcome:
    """Send a request and fill in its outcome; cancelling it closes the connection.

    Args:
        request: what to send.
        outcome: with its number and due time set.
        pool: connections of the target.
        start: ``time.perf_counter()`` at the start of the load.
    """
    connection, answer = pool.acquire(), None
    path, body = pool.target.encode(request)
    outcome.sent_s = time.perf_counter() - start
    try:
        async with asyncio.timeout(pool.target.timeout_s):
            answer = await connection.post(path, body)
            await _read(answer, outcome, start=start, keep_text=pool.target.keep_text)
    except RequestError as error:
        outcome.error, outcome.why = error.kind, str(error)
    except TimeoutError:
        outcome.error, outcome.why = "timeout", f"the answer is not complete after {pool.target.timeout_s:g} s"
    except asyncio.CancelledError:
        outcome.error = "unfinished"
        raise
    finally:
        outcome.end_s = time.perf_counter() - start
        if answer is not None and answer.keeps:
            pool.release(connection)
        else:
            connection.close()
    return outcome


async def _read(answer: HttpResponse, outcome: RequestOutcome, *, start: float, keep_text: bool) -> None:
    if answer.status != 200:
        raise RequestError(str(answer.status), (await answer.body())[:_SHOWN].decode(errors="replace"))
    async for event in _events(answer):
        _update_outcome(event, outcome, now=time.perf_counter() - start, keep_text=keep_text)
    if not outcome.finish:
        raise RequestError("cut", "the answer ended without a reason to finish")


async def _events(answer: HttpResponse) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of each event of a stream, or the JSON of a plain body.

    Some servers send the wrong content type, so the body decides.

    Comments and the ``[DONE]`` event are skipped.
    """
    rest, plain, is_stream = b"", b"", False
    async for piece in answer.pieces():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                is_stream = True
                if not (data := line[5:].strip()).startswith(b"[DONE]"):
                    yield _object(data)
            elif not is_stream:
                plain += line + b"\n"
    if not is_stream:
        yield _object(plain + rest)


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise RequestError("frame", f"no JSON: {data[:_SHOWN]!r}") from error
    if not isinstance(found, dict) or "error" in found:
        raise RequestError("frame", data[:_SHOWN].decode(errors="replace"))
    return found


def _update_outcome(event: dict[str, Any], outcome: RequestOutcome, *, now: float, keep_text: bool) -> None:
    """Add an event, or a plain body, to the outcome."""
    for choice in event.get("choices") or ():
        message = choice.get("delta") or choice.get("message") or choice
        text = message.get("content") or message.get("text") or ""
        if text:
            outcome.chunks_s.append(now)
            outcome.tokens += 1
            if keep_text:
                outcome.text += text
        outcome.finish = choice.get("finish_reason") or outcome.finish
    if usage := event.get("usage"):
        outcome.prompt_tokens = usage.get("prompt_tokens", 0)
        outcome.tokens = usage.get("completion_tokens", outcome.tokens)
