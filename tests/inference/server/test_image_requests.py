"""Images through a real server: answers as Transformers gives them, limits, bad images, and workers that end."""

from __future__ import annotations

import base64
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import Start as StartProcess
from tests.helpers import wait_for
from tests.image_rows import encoded, picture, png_of_size
from tests.inference.image_models import NEW_TOKENS, ImageModel, data_url, image, write_model
from tests.inference.server.conftest import Served, _starter, events
from tests.inference.test_image_engine import MIXED
from tests.processes import marked

NAME = "sees"
BYTES = 20_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    folder = tmp_path_factory.mktemp("images") / "idefics3"
    write_model(folder, "idefics3")
    return ImageModel(folder)


class _Pictures(BaseHTTPRequestHandler):
    """Sends the picture whose number is the path."""

    def do_GET(self) -> None:
        raw = encoded(picture(*image(int(self.path[1:]))))
        self.send_response(200)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def pictures() -> Iterator[str]:
    """Return a host that serves pictures."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def served(
    model: ImageModel, pictures: str, tmp_path_factory: pytest.TempPathFactory, preloading: StartProcess
) -> Iterator[Served]:
    starter = _starter(lambda: tmp_path_factory.mktemp("server") / uuid.uuid4().hex[:8], preloading)
    for start in starter:
        yield start(
            *("job.engine=paged", "model=hf", f"model.name={model.folder}", f"job.served_model_name={NAME}"),
            *("job.tokenizer=model", "job.warm_up=[[1,4]]", "job.prefill_chunk_size=24", "job.max_images=3"),
            *("job.max_image_pixels=10000", f"job.max_image_bytes={BYTES}", "job.result_cache_bytes=1000000"),
            f"job.image_hosts=['{pictures}']",
        )


def parts(content: Sequence[str | int]) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part), "detail": "auto"}}
        for part in content
    ]


def ask(served: Served, content: Any, **more: Any) -> httpx.Response:
    body = {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": NEW_TOKENS}
    return served.http.post("/v1/chat/completions", json={**body, "temperature": 0, "ignore_eos": True, **more})


def test_eight_mixed_requests_at_once_get_what_transformers_gives_each(served: Served, model: ImageModel) -> None:
    def text(number: int) -> str:
        response = ask(served, parts(MIXED[number]), stream=number % 2 == 0)
        assert response.status_code == 200, response.text
        if number % 2:
            return str(response.json()["choices"][0]["message"]["content"])
        deltas = [choice["delta"] for event in events(response) for choice in event["choices"]]
        return "".join(delta.get("content", "") for delta in deltas)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(text, range(8)))
    alone = [model.alone(content) for content in MIXED]
    assert texts == [model.tokenizer.decode(made) for _, made in alone]
    usage = ask(served, parts(MIXED[2])).json()["usage"]
    assert usage["prompt_tokens"] == len(alone[2][0])
    assert usage["total_tokens"] == len(alone[2][0]) + NEW_TOKENS
    body = {"model": NAME, "messages": [{"role": "user", "content": parts(MIXED[2])}]}
    assert served.http.post("/tokenize", json=body).json()["tokens"] == alone[2][0]


def test_results_are_cached_by_the_content_of_images(served: Served, model: ImageModel) -> None:
    first, other = ["Cached?", 9], ["Cached?", 13]
    answers = [ask(served, parts(content)) for content in (first, other, first)]
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", "miss", "hit"]
    texts = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
    assert texts == [model.tokenizer.decode(model.alone(content)[1]) for content in (first, other, first)]
    assert texts[0] != texts[1]


def url_of(raw: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


BAD = {
    "a bomb of 500 megapixels": (url_of(png_of_size(25_000, 20_000)), "500,000,000 pixels"),
    "more pixels than allowed": (url_of(png_of_size(101, 100)), "10,100 pixels"),
    "too many bytes": (url_of(bytes(BYTES + 3)), "may have"),
    "broken base64": ("data:image/png;base64,%%%", "no valid base64"),
    "a cut file": (url_of(encoded(picture(1, (90, 90)))[:200]), "damaged or cut off"),
    "no image": (url_of(b"GIF87a"), "the image"),
    "a type that is not decoded": (url_of(encoded(picture(1), "TIFF"), "image/tiff"), "no image of PNG"),
    "a text": (url_of(b"<svg/>", "text/html"), "text/html"),
    "an address": ("http://127.0.0.1:9/a.png", "not fetched"),
    "a file": ("file:///etc/passwd", "not fetched"),
    "nothing": ("", "not fetched"),
}


def test_bad_images_are_refused_by_name_beside_good_ones(served: Served, model: ImageModel) -> None:
    good = parts([1, "good"])

    def refused(url: str) -> httpx.Response:
        return ask(served, [*good, {"type": "image_url", "image_url": {"url": url}}])

    with ThreadPoolExecutor(len(BAD) + 1) as pool:
        beside = pool.submit(ask, served, parts([6, "beside"]))
        answers = list(pool.map(refused, [url for url, _ in BAD.values()]))
    for (what, (_, words)), answer in zip(BAD.items(), answers, strict=True):
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, "messages.0.content", "invalid_image"), what
        assert "part 2" in error["message"], what
        assert words in error["message"], (what, error["message"])
    content = beside.result().json()["choices"][0]["message"]["content"]
    assert content == model.tokenizer.decode(model.alone([6, "beside"])[1])


def test_parts_that_are_no_images_are_refused_by_name(served: Served) -> None:
    url = {"url": data_url(1)}
    for part, words in (
        ({"type": "image_url"}, "null as its image_url"),
        ({"type": "image_url", "image_url": data_url(1)}, "as its image_url"),
        ({"type": "image_url", "image_url": {**url, "detail": "high"}}, "leave image_url.detail out"),
        ({"type": "image_url", "image_url": {**url, "size": 3}}, "image_url.'size'"),
        ({"type": "image_url", "image_url": url, "size": 3}, "the field 'size'"),
        ({"type": "input_audio", "input_audio": {}}, "text and image_url only"),
    ):
        answer = ask(served, [part])
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
    for content, words in (
        (parts([1, 2, 3, 4]), "allows 3"),
        (parts([1, "an <image> that is none"]), "a text holds <image>, which stands for an image of this model"),
        (parts(["an <image> that is none"]), "a text holds <image>, which stands for an image of this model"),
    ):
        answer = ask(served, content)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
    answer = served.http.post("/v1/completions", json={"model": NAME, "prompt": "an <image>"})
    assert (answer.status_code, "a text holds <image>" in answer.json()["error"]["message"]) == (400, True)
    body = {"model": NAME, "messages": [{"role": "assistant", "content": parts([1])}]}
    answer = served.http.post("/v1/chat/completions", json=body)
    assert "only a user's message" in answer.json()["error"]["message"]


def test_an_image_of_an_allowed_host_is_fetched(served: Served, model: ImageModel, pictures: str) -> None:
    answer = ask(served, [{"type": "image_url", "image_url": {"url": f"http://{pictures}/9"}}, *parts(["fetched"])])
    content = answer.json()["choices"][0]["message"]["content"]
    assert content == model.tokenizer.decode(model.alone([9, "fetched"])[1])
    other = ask(served, [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/1"}}])
    assert (other.status_code, "not fetched" in other.json()["error"]["message"]) == (400, True)


def workers(served: Served) -> list[psutil.Process]:
    return [each for each in marked(served.mark) if "launcher.inference.server.image_worker" in each.cmdline()]


def test_an_image_that_ends_its_worker_fails_alone_and_the_worker_is_replaced(
    served: Served, model: ImageModel
) -> None:
    (worker,) = workers(served)
    worker.suspend()
    with ThreadPoolExecutor(2) as pool:
        hostile = pool.submit(ask, served, parts([21, "hostile"]))
        text = ask(served, parts(["Only text."]))
        assert text.json()["choices"][0]["message"]["content"] == model.tokenizer.decode(model.alone(["Only text."])[1])
        assert not hostile.done()
        later = pool.submit(ask, served, parts([22, "later"]))
        worker.send_signal(signal.SIGKILL)
        error = hostile.result().json()["error"]
        content = later.result().json()["choices"][0]["message"]["content"]
    assert (error["code"], "ended the process that decodes it" in error["message"]) == ("invalid_image", True)
    assert content == model.tokenizer.decode(model.alone([22, "later"])[1])
    wait_for(lambda: len(workers(served)) == 1)


def test_a_server_that_ends_leaves_no_files(served: Served) -> None:
    """It is the last test: it ends the server."""
    (worker,) = workers(served)
    (folder,) = Path(tempfile.gettempdir()).glob(f"launcher-images-{worker.ppid()}-*")
    assert any(folder.iterdir())
    assert served.stop() == 0
    assert not folder.exists()
