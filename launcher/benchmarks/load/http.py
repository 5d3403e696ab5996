"""The part of HTTP/1.1 that a load generator needs: POST on a kept connection, and the answer's body as it comes.

A client library would take a multiple of the processor time, on the very cores whose work is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

_LIMIT = 1 << 20
"""Longest line and header, in bytes."""


class Trouble(Exception):
    """The server could not be reached, or broke off; ``kind`` is one word to count by."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(f"{kind}: {why}")
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server is: ``http://host:port/prefix``."""

    host: str
    port: int
    prefix: str

    @property
    def base(self) -> str:
        """The address as one writes it."""
        return f"http://{self.host}:{self.port}{self.prefix}"


def parse_address(url: str) -> Address:
    """Return the address in ``url``.

    Raises:
        ValueError: it is none, or asks for encryption, which this client lacks.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.query:
        raise ValueError("is no address like http://127.0.0.1:8000 (without TLS)")
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Address(host=parts.hostname, port=parts.port or 80, prefix=prefix)


class Answer:
    """Status and headers of an answer, and its body piece by piece."""

    def __init__(self, reader: asyncio.StreamReader, status: int, headers: Mapping[str, str]) -> None:
        self._reader, self.status, self._headers = reader, status, headers
        self.is_whole = False
        """Whether the body came to its end, so that the connection can be used again."""

    @property
    def keeps(self) -> bool:
        """Whether the connection may be used again."""
        return self.is_whole and self._headers.get("connection", "").lower() != "close"

    async def body(self) -> bytes:
        """Return all of it."""
        return b"".join([piece async for piece in self.pieces()])

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield what comes, as it comes.

        Raises:
            Trouble: it broke off.
        """
        try:
            if self._headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int((await self._reader.readline()).split(b";")[0].strip() or b"-1", 16):
                    if size < 0:
                        raise Trouble("cut", "the connection ended inside an answer")
                    yield (await self._reader.readexactly(size + 2))[:-2]
                await self._reader.readline()
            elif "content-length" in self._headers:
                yield await self._reader.readexactly(int(self._headers["content-length"]))
            else:
                while piece := await self._reader.read(_LIMIT):
                    yield piece
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            raise Trouble("cut", str(error)) from error
        self.is_whole = True


class Connection:
    """One connection, opened at the first request and again after a server that closed it."""

    def __init__(self, address: Address, *, headers: Mapping[str, str]) -> None:
        self._address = address
        lines = {"Host": f"{address.host}:{address.port}", "Content-Type": "application/json", **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def get(self, path: str) -> Answer:
        """Ask for what is at a path; otherwise like ``post``."""
        return await self._ask("GET", path, b"")

    async def post(self, path: str, body: bytes) -> Answer:
        """Send a request and return the answer once its headers are there.

        Raises:
            Trouble: nobody answers.
        """
        return await self._ask("POST", path, body)

    async def _ask(self, method: str, path: str, body: bytes) -> Answer:
        is_kept = self._writer is not None
        try:
            return await self._once(method, path, body)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            self.close()
            if not is_kept:
                raise Trouble("connect", str(error) or type(error).__name__) from error
        try:  # the server may close a connection that rested
            return await self._once(method, path, body)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            self.close()
            raise Trouble("connect", str(error) or type(error).__name__) from error

    async def _once(self, method: str, path: str, body: bytes) -> Answer:
        if self._writer is None or self._reader is None:
            host, port = self._address.host, self._address.port
            self._reader, self._writer = await asyncio.open_connection(host, port, limit=_LIMIT)
        head = f"{method} {self._address.prefix}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin1").split("\r\n")
        fields = (line.partition(":") for line in lines[1:] if line)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        return Answer(self._reader, int(lines[0].split()[1]), headers)

    def close(self) -> None:
        """Break off, whatever is under way: so a client vanishes."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None
