"""The page at / in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser import open_browser
from tests.helpers import wait_for
from tests.inference.server.conftest import Served

pytestmark = pytest.mark.filterwarnings("ignore")  # of the driver's own


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as started:
        yield started


def test_the_page_shows_and_streams(browser: Any, served: Served) -> None:
    browser.get(served.url)
    assert browser.title == "gpt2_tiny"
    find = lambda name: browser.find_element("id", name)  # noqa: E731
    wait_for(lambda: find("ready").text == "ready")
    before = served.metric("request_success_total")
    find("prompt").send_keys("héllo wörld ")
    find("go").click()
    wait_for(lambda: find("answer").text.startswith("héllo wörld héllo"))
    wait_for(lambda: find("go").is_enabled())
    assert served.metric("request_success_total") == before + 1
    find("go").click()
    wait_for(lambda: find("hits").text.endswith("%") and find("kept").text.startswith(f"{len_of(served)} "))
    wait_for(lambda: find("rate").text != "–")
    assert find("line").get_attribute("points")
    find("prompt").clear()
    find("go").click()
    wait_for(lambda: "has no tokens" in find("answer").text)
    wrong = [line for line in browser.get_log("browser") if line["level"] == "SEVERE" and "400" not in line["message"]]
    assert not [line for line in wrong if "favicon" not in line["message"]]
    assert "http" not in served.http.get("/").text.replace("http-equiv", "")  # nothing comes from elsewhere


def len_of(served: Served) -> int:
    return int(served.metric("result_cache_size"))
