"""Checks of HTTP heads, and connections with limits on number, size and time."""

from __future__ import annotations

import asyncio
import http
import ipaddress
import json
import logging
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from launcher.config.inference import connections_per_client
from launcher.inference.server.responses import ApiError
from launcher.utils.system import is_loopback, is_network

MAX_HEAD_BYTES = 1 << 14
"""Request line and headers."""
MAX_HEADERS = 256
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_SINGLE = (b"host", b"content-length", b"transfer-encoding", b"authorization", b"expect")
"""Headers that may be there once only: two programs may take two different ones."""
_LENGTH = re.compile(rb"[0-9]{1,18}")
_VERSION = re.compile(rb"HTTP/1\.[01]")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?", re.ASCII)
_HIDDEN = re.compile(rb"%(?:00|2e|2f|5c|0[ad]|25)|[\\#]", re.IGNORECASE)
"""Encoded NUL, dot, slash, line end or percent sign, and characters no path may hold.
The encoded backslash, too."""
_ENCODED_SLASH = re.compile(rb"%2f", re.IGNORECASE)
_MODELS = b"/v1/models/"
"""Path prefix of a model name, in which OpenAI's client encodes slashes."""
_TAKES_BODY = frozenset({"POST", "PUT", "PATCH"})


def validate_head(data: bytes) -> ApiError | None:
    """Return what is wrong with the request head in ``data``; ``None`` too if incomplete."""
    end = _END_OF_HEAD.search(data, 0, MAX_HEAD_BYTES + 4)
    if end is None:
        if len(data) > MAX_HEAD_BYTES:
            said = f"the request line and headers have more than {MAX_HEAD_BYTES:,} bytes"
            return ApiError(431, said, code="headers_too_large", closes=True)
        return None
    head = data[: end.start()]
    if b"\0" in head or b"\r" in head.replace(b"\r\n", b"") or b"\n" in head.replace(b"\r\n", b"") or end[0][0] == 10:
        return _malformed("a line of the head does not end with CR LF, or holds a NUL")
    first, *lines = head.split(b"\r\n")
    if len(lines) > MAX_HEADERS:
        return ApiError(431, f"more than {MAX_HEADERS} headers", code="headers_too_large", closes=True)
    version = first.rpartition(b" ")[2]
    if not _VERSION.fullmatch(version):
        return _malformed("the request line does not end with HTTP/1.0 or HTTP/1.1")
    found: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or line[:1] in (b" ", b"\t") or name != name.strip():
            return _malformed("a header is not written NAME: VALUE in one line")
        name = name.lower()
        if name in _SINGLE and name in found:
            return _malformed(f"the header {name.decode()} is there twice")
        found[name] = value.strip()
    return _validate_framing(found, is_old=version == b"HTTP/1.0")


def _validate_framing(headers: Mapping[bytes, bytes], *, is_old: bool) -> ApiError | None:
    length, encoding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
    if length is not None and encoding is not None:
        return _malformed("it has both Content-Length and Transfer-Encoding; send one of them")
    if length is not None and not _LENGTH.fullmatch(length):
        return _malformed("Content-Length is not one number")
    if encoding is not None and (is_old or encoding.lower() != b"chunked"):
        return _malformed("the only Transfer-Encoding that this server takes is chunked, in HTTP/1.1")
    if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        return ApiError(
            417, "the only Expect that this server supports is 100-continue", code="unsupported_expect", closes=True
        )
    return None


def _malformed(why: str) -> ApiError:
    return ApiError(400, f"this is not a valid HTTP request: {why}", code="invalid_http", closes=True)


def check_target(raw_path: bytes) -> None:
    """Raise where a path can be read in several ways.

    Raises:
        ApiError: it does not begin with one slash, has a segment of dots or holds encoded characters of paths.
    """
    why, path = "", raw_path
    if path.startswith(_MODELS):
        path = _ENCODED_SLASH.sub(b"/", path)
    if not path.startswith(b"/") or path.startswith(b"//"):
        why = "it does not begin with one slash"
    elif _HIDDEN.search(path):
        why = "it holds an encoded slash, dot, percent sign or control character"
    elif any(segment.partition(b";")[0] in (b".", b"..") for segment in path.split(b"/")):
        why = "it has a segment of dots"
    elif b"//" in path:
        why = "it has an empty segment"
    if why:
        raise ApiError(400, f"the request target cannot be used: {why}", code="invalid_target", closes=True)


def has_body(headers: Mapping[bytes, bytes]) -> bool:
    """Whether more than the head will come."""
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0").strip(b"0") != b""


def check_body_allowed(method: str, headers: Mapping[bytes, bytes], *, may: bool) -> None:
    """Raise for a body where none belongs.

    Args:
        method: of the request.
        headers: of the request.
        may: whether its path takes one.

    Raises:
        ApiError: there is one.
    """
    if has_body(headers) and not (may and method in _TAKES_BODY):
        raise ApiError(400, f"this {method[:20]} request must not have a body", code="unexpected_body", closes=True)


class AllowedHosts:
    """Names by which a server without keys may be called.

    A web page of a stranger can make a browser send requests to this machine under the page's own name, which its
    owner lets point here (DNS rebinding). An address cannot be pointed elsewhere.

    Args:
        host: that the server listens on.
        names: that are allowed besides; ``*`` is every one.
    """

    def __init__(self, host: str, names: Sequence[str] = ()) -> None:
        self._is_local = is_loopback(host)
        self._names = {_unmapped(host), *map(_unmapped, names)}
        if not self._is_local:
            self._names.add(_unmapped(socket.gethostname()))

    def check(self, headers: Mapping[bytes, bytes], *, http_version: str) -> None:
        """Raise where a request is meant for another host, or comes from a page of one.

        Raises:
            ApiError: and which option allows it.
        """
        host, origin = headers.get(b"host"), headers.get(b"origin")
        if host is None and http_version == "1.0":  # no browser sends this
            return
        shown = (host or b"").decode("latin-1")
        if not self._allows(shown):
            said = (
                f"the Host header {shown[:100]!r} is not a name of this server. Set job.allowed_hosts, or use API keys."
            )
            raise ApiError(403, said, code="host_not_allowed", closes=True)
        if origin is not None and not self._allows(origin.decode("latin-1").partition("://")[2]):
            said = "the page that sends this comes from another host. Set job.allowed_hosts, or use API keys."
            raise ApiError(403, said, code="origin_not_allowed", closes=True)

    def _allows(self, shown: str) -> bool:
        match = _HOST.fullmatch(shown)
        if match is None:
            return False
        name = _unmapped(match[1])
        if name in self._names or "*" in self._names or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._is_local


def client_network(address: str) -> str:
    """Return the client's network: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


class TrustedProxies:
    """Load balancers that tell which client a request comes from.

    Args:
        networks: their addresses or networks.
    """

    def __init__(self, networks: Sequence[str] = ()) -> None:
        self._networks = [ipaddress.ip_network(each, strict=False) for each in networks]

    def client(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return the address of the client: the last one that no trusted proxy has.

        Args:
            peer: address at the other end of the connection.
            headers: of the request; X-Forwarded-For counts only from a trusted proxy.
        """
        if not self._networks:
            return peer
        lines = [value.decode("latin-1") for name, value in headers if name == b"x-forwarded-for"]
        named = [each.strip() for each in ",".join(lines).split(",")]
        while named and self._trusts(peer) and is_network(named[-1]) and "/" not in named[-1]:
            peer = named.pop()
        return peer

    def _trusts(self, address: str) -> bool:
        found = ipaddress.ip_address(_unmapped(address).partition("%")[0])
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        return any(found in network for network in self._networks)


def _unmapped(name: str) -> str:
    return name.strip().strip("[]").lower().rstrip(".")


_MAX_CHUNKS, _SMALL_CHUNK = 1024, 256
"""Chunks that any body may have, and the least average bytes of further ones.
Each chunk takes time to read."""

_LINGER_S, _LINGER_BYTES = 10.0, 1 << 25
"""Seconds and bytes for which a client that still sends is read after its answer.
Closing at once would reset the connection, and then the answer is lost before the client reads it."""


class ChunksTooSmall(h11.RemoteProtocolError):
    """A body that takes more time to put together than to send."""


class _Reader(h11.Connection):
    """One client's requests; refuses a body that consists of tiny chunks."""

    _chunks = _received = 0

    def next_event(self) -> Any:
        """Return the next event."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._received = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._received += len(event.data)
            if self._chunks > _MAX_CHUNKS and self._received < _SMALL_CHUNK * self._chunks:
                raise ChunksTooSmall(
                    f"the body has more than {_MAX_CHUNKS:,} chunks with less than {_SMALL_CHUNK} bytes on average; "
                    "send it with Content-Length, or in larger chunks"
                )
        return event


class _Transport:
    """A connection that lingers: closed during a request, it waits for the response to be read."""

    def __init__(self, transport: Any, owner: Any) -> None:
        self._transport, self._owner = transport, owner
        self.num_to_discard: int | None = None
        """Bytes that are still discarded; ``None`` before ``close``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more will be read or written."""
        return self.num_to_discard is not None or bool(self._transport.is_closing())

    def close(self) -> None:
        """Close, once the client has stopped sending or a time limit has passed."""
        if self.num_to_discard is not None:
            return
        if self._transport.is_closing() or self._owner.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            self._transport.close()
            return
        try:
            self._transport.write_eof()
        except OSError:  # the client is gone already
            self._transport.close()
            return
        self.num_to_discard = _LINGER_BYTES
        self._transport.resume_reading()
        self._owner.loop.call_later(_LINGER_S, self._transport.abort)

    def discard(self, data: bytes) -> None:
        """Discard bytes that the client still sends; abort the connection where there are too many."""
        assert self.num_to_discard is not None
        self.num_to_discard -= len(data)
        if self.num_to_discard <= 0:
            self._transport.abort()


def limited_protocol(max_connections: int, *, headers_timeout_s: float, write_timeout_s: float) -> type[H11Protocol]:
    """Return uvicorn's protocol with limits.

    Args:
        max_connections: that are open at the same time.
        headers_timeout_s: from a connection, or the first byte of a further request, to the end of its headers.
        write_timeout_s: that a client may read nothing while socket buffers are full; then it is disconnected.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # invalid requests of clients are not logged
    of_one_address = connections_per_client(max_connections)
    open_by: Counter[str] = Counter()

    class Limited(H11Protocol):
        """One connection."""

        transport: Any
        _deadline: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None
        _address = ""

        def connection_made(self, transport: Any) -> None:
            """Accept a connection, or reject it with 503."""
            super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
            self.conn = _Reader(h11.SERVER, MAX_HEAD_BYTES)
            self._address = client_network(self.client[0]) if self.client else ""
            open_by[self._address] += 1
            if len(self.connections) > max_connections or open_by[self._address] > of_one_address:
                self._reject(ApiError(503, "too many connections", code="too_many_connections", retry_s=2))
                return
            self._start_deadline()

        def connection_lost(self, exc: Exception | None) -> None:
            """Stop the timers of the connection."""
            open_by[self._address] -= 1
            if not open_by[self._address]:
                del open_by[self._address]
            self._cancel_deadline()
            self._cancel_write_timeout()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Read; a client that starts a request must complete its headers in time."""
            if self.transport.num_to_discard is not None:
                self.transport.discard(data)
                return
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._cancel_deadline()
            elif self.conn.trailing_data[0]:
                self._start_deadline()

        def handle_events(self) -> None:
            """Handle received events, unless they start with an ambiguous request head."""
            if self.transport.num_to_discard is not None:
                return
            if self.conn.their_state is h11.IDLE:
                problem = validate_head(self.conn.trailing_data[0])
                if problem is not None:
                    self._reject(problem)
                    return
            super().handle_events()

        def send_400_response(self, msg: str) -> None:
            """Send status 400 for invalid HTTP, unless a response has started.

            It is called while h11's error is handled.
            """
            why = sys.exception()
            said = str(why) if isinstance(why, ChunksTooSmall) else f"this is not a valid HTTP request: {msg}"
            self._reject(ApiError(400, said, code="invalid_http"))

        def on_response_complete(self) -> None:
            """Continue, unless the response came before the whole body: nothing reads that any more."""
            if self.conn.their_state is h11.SEND_BODY:
                self.transport.close()
            super().on_response_complete()

        def pause_writing(self) -> None:
            """Wait for the client to read, up to the write timeout: closing would wait without one."""
            super().pause_writing()
            self._write_timer = self.loop.call_later(write_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            """Stop the write timer."""
            self._cancel_write_timeout()
            super().resume_writing()

        def _cancel_write_timeout(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        def _start_deadline(self) -> None:
            if self._deadline is None:
                self._deadline = self.loop.call_later(headers_timeout_s, self._time_out)

        def _cancel_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _time_out(self) -> None:
            self._deadline = None
            if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
                self._reject(ApiError(408, f"no request came within {headers_timeout_s:g} s", code="header_timeout"))

        def _reject(self, problem: ApiError) -> None:
            """Send an error outside of any request, and close.

            A request that has started counts as cancelled.
            """
            has_begun = False
            if self.cycle is not None and not self.cycle.response_complete:
                has_begun = self.cycle.response_started
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if not has_begun:
                body = json.dumps(problem.body()).encode()
                reason = http.HTTPStatus(problem.status).phrase
                headers = {**problem.headers, "content-type": "application/json", "connection": "close"}
                head = f"HTTP/1.1 {problem.status} {reason}\r\ncontent-length: {len(body)}\r\n"
                head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                self.transport.write(f"{head}\r\n".encode() + body)
            self.transport.close()

    return Limited
