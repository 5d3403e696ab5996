"""Images from addresses: allowed hosts alone, within limits, without redirects."""

from __future__ import annotations

import asyncio
import base64

import httpx
import pytest

from launcher.config.data.images import BadImage
from launcher.inference.server.image_fetcher import ImageFetcher

ANSWERS = {
    "/good": httpx.Response(200, content=b"12345"),
    "/large": httpx.Response(200, content=b"123456"),
    "/moved": httpx.Response(302, headers={"location": "http://169.254.169.254/"}),
    "/missing": httpx.Response(404),
}


def fetch(url: str) -> tuple[str, list[str]]:
    """Return what a URL becomes, and the addresses that were asked."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        if request.url.path == "/down":
            raise httpx.ConnectError("down")
        found = ANSWERS[request.url.path]
        return httpx.Response(found.status_code, headers=found.headers, content=found.content)

    hosts = ("Images.example.org", "10.0.0.5:8080")
    fetcher = ImageFetcher(hosts, max_bytes=5, transport=httpx.MockTransport(answer))
    return asyncio.run(fetcher.data_url(url)), asked


@pytest.mark.parametrize(
    "url",
    [
        *("https://images.example.org/good", "HTTP://IMAGES.example.org:80/good", "http://10.0.0.5:8080/good"),
        "https://images.example.org:443/good",
    ],
)
def test_an_allowed_host_is_asked(url: str) -> None:
    made, asked = fetch(url)
    assert base64.b64decode(made.removeprefix("data:;base64,")) == b"12345"
    assert len(asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        *("data:image/png;base64,eA==", "https://example.org/good", "http://images.example.org:8080/good"),
        *("http://10.0.0.5/good", "http://images.example.org@10.0.0.6/good", "http://a:b@images.example.org/good"),
        *("http://images.example.org.evil.org/good", "file://images.example.org/good", "http://[::1", "http://", ""),
        *("https://images.example.org:99999999/good", "http://images.example.org\n/good"),
    ],
)
def test_others_are_left_to_the_worker_which_refuses_them(url: str) -> None:
    assert fetch(url) == (url, [])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        *(("large", "more than the 5 B"), ("moved", "redirects are not followed"), ("missing", "status 404")),
        ("down", "cannot be reached"),
    ],
)
def test_what_cannot_be_used_is_refused(path: str, words: str) -> None:
    with pytest.raises(BadImage, match=words):
        fetch(f"http://images.example.org/{path}")
