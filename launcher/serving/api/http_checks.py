"""What a request must look like before anything of it is used: its head, its target, its host, its framing.

Each check refuses what two HTTP programs could read in two ways, because a proxy stands before this server, or this
server before vLLM: then the one that checks the key may see another request than the one that answers it.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence

from launcher.ports import is_loopback
from launcher.serving.api.problems import ApiError

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
"""In a path: an encoded NUL, dot, slash, backslash, line end or percent sign, and what no path holds unencoded."""
_ENCODED_SLASH = re.compile(rb"%2f", re.IGNORECASE)
_MODELS = b"/v1/models/"
"""What follows is a name, in which OpenAI's client encodes slashes."""
_TAKES_BODY = frozenset({"POST", "PUT", "PATCH"})


def check_head(data: bytes) -> ApiError | None:
    """Return what is wrong with the request that ``data`` begins with; ``None`` too while its head is incomplete."""
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
    return _check_framing(found, is_old=version == b"HTTP/1.0")


def _check_framing(headers: Mapping[bytes, bytes], *, is_old: bool) -> ApiError | None:
    length, encoding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
    if length is not None and encoding is not None:
        return _malformed("it has both Content-Length and Transfer-Encoding; send one of them")
    if length is not None and not _LENGTH.fullmatch(length):
        return _malformed("Content-Length is not one number")
    if encoding is not None and (is_old or encoding.lower() != b"chunked"):
        return _malformed("the only Transfer-Encoding that this server takes is chunked, in HTTP/1.1")
    if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        return ApiError(417, "this server knows no Expect but 100-continue", code="unsupported_expect", closes=True)
    return None


def _malformed(why: str) -> ApiError:
    return ApiError(400, f"this is no valid HTTP request: {why}", code="invalid_http", closes=True)


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
        raise ApiError(400, f"this {method[:20]} request takes no body", code="unexpected_body", closes=True)


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
        self._names = {_plain(host), *map(_plain, names)}
        if not self._is_local:
            self._names.add(_plain(socket.gethostname()))

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
            said = f"the Host header {shown[:100]!r} is no name of this server. Set job.allowed_hosts, or use API keys."
            raise ApiError(403, said, code="host_not_allowed", closes=True)
        if origin is not None and not self._allows(origin.decode("latin-1").partition("://")[2]):
            said = "the page that sends this comes from another host. Set job.allowed_hosts, or use API keys."
            raise ApiError(403, said, code="origin_not_allowed", closes=True)

    def _allows(self, shown: str) -> bool:
        match = _HOST.fullmatch(shown)
        if match is None:
            return False
        name = _plain(match[1])
        if name in self._names or "*" in self._names or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._is_local


def network_of(address: str) -> str:
    """Return what counts as one client: an IPv4 address, or the /64 network that an IPv6 host has for itself."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def _plain(name: str) -> str:
    return name.strip().strip("[]").lower().rstrip(".")
