"""Images from addresses of hosts that an option allows; the worker refuses all others."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

import httpx

from launcher.config.data.images import BadImage
from launcher.utils.text import bytes_text

_SCHEMES = {"http": 80, "https": 443}
_TIMEOUT_S = 10.0
"""For the whole of an image."""


class ImageFetcher:
    """Fetches images from allowed hosts.

    Redirects are not followed: they could lead to any other host.

    Args:
        hosts: names or addresses, with a port where it is not the scheme's own.
        max_bytes: of an image; no more is read.
        transport: of HTTP.
    """

    def __init__(
        self, hosts: Sequence[str], *, max_bytes: int, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._hosts, self._max_bytes = {host.lower() for host in hosts}, max_bytes
        self._transport = transport or httpx.AsyncHTTPTransport(trust_env=False)

    async def close(self) -> None:
        """Close connections."""
        await self._transport.aclose()

    async def data_url(self, url: str) -> str:
        """Return the data URL of what an address of an allowed host holds; any other URL as it is.

        Raises:
            BadImage: it cannot be fetched, or is too large.
        """
        if not url[:8].lower().startswith(("http://", "https://")):
            return url
        try:
            request = httpx.Request("GET", url, headers={"accept": "image/*"})
        except (httpx.InvalidURL, UnicodeError, ValueError):
            return url
        if not self._allows(request.url):
            return url
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                raw = await self._read(request)
        except TimeoutError:
            raise BadImage(f"{request.url.host} did not send the image within {_TIMEOUT_S:g} s") from None
        except httpx.HTTPError as error:
            raise BadImage(f"{request.url.host} cannot be reached: {type(error).__name__}") from None
        encoded = await asyncio.to_thread(base64.b64encode, raw)
        return f"data:;base64,{encoded.decode()}"

    def _allows(self, url: httpx.URL) -> bool:
        port = url.port or _SCHEMES[url.scheme]
        is_usual = port == _SCHEMES[url.scheme]
        return not url.userinfo and (f"{url.host}:{port}" in self._hosts or (is_usual and url.host in self._hosts))

    async def _read(self, request: httpx.Request) -> bytes:
        response = await self._transport.handle_async_request(request)
        try:
            if response.status_code != 200:
                redirects = ", and redirects are not followed" if 300 <= response.status_code < 400 else ""
                raise BadImage(f"{request.url.host} answered with status {response.status_code}{redirects}")
            raw = bytearray()
            assert isinstance(response.stream, httpx.AsyncByteStream), "the transport is asynchronous"
            async for piece in response.stream:
                raw += piece
                if len(raw) > self._max_bytes:
                    most = bytes_text(self._max_bytes)
                    raise BadImage(f"{request.url.host} sends more than the {most} that an image may have")
            return bytes(raw)
        finally:
            await response.aclose()
