"""The field ``model`` chooses an adapter or the base model; nothing that is kept of one answers for another."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from launcher.config.inference import EngineLimits
from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.echo_engine import EchoEngine
from launcher.inference.tokenizer import byte_tokenizer
from tests.inference.server.conftest import events
from tests.inference.server.in_process import MODEL, in_process

ADAPTERS = {"polite": "/secret/place/polite-r8", "org/terse": "/secret/place/terse"}


class Recording(EchoEngine):
    """Echoes prompts, and notes which adapter each request had."""

    adapters: Sequence[str] = tuple(ADAPTERS)

    def __init__(self) -> None:
        super().__init__(limits=EngineLimits(), max_model_len=64, vocab_size=300)
        self.asked: list[str] = []

    def _accept(self, request: EngineRequest) -> None:
        self.asked.append(request.adapter)
        super()._accept(request)


@pytest.fixture
def recording() -> Recording:
    return Recording()


def body(model: str, **more: object) -> dict[str, object]:
    return {"model": model, "prompt": "abc", "max_tokens": 4, "temperature": 0, **more}


def test_each_request_reaches_the_engine_with_its_adapter_and_is_answered_under_its_name(recording: Recording) -> None:
    with in_process(recording, byte_tokenizer(), adapters=ADAPTERS) as served:
        names = (MODEL, *ADAPTERS)
        answers = [served.post("/v1/completions", body(name))[0] for name in names]
        assert [answer.json()["model"] for answer in answers] == list(names)
        assert recording.asked == ["", *ADAPTERS]
        (stream,) = served.post("/v1/completions", body("polite", stream=True))
        assert {event["model"] for event in events(stream)} == {"polite"}
        tokens = [served.post("/tokenize", {"model": name, "prompt": "abc"})[0].json()["count"] for name in names]
        assert tokens == [3, 3, 3]


def test_models_are_listed_with_their_parent_and_without_paths(recording: Recording) -> None:
    with in_process(recording, byte_tokenizer(), adapters=ADAPTERS) as served:
        listed = served.get("/v1/models").json()["data"]
        assert [(each["id"], each["root"], each["parent"]) for each in listed] == [
            (MODEL, MODEL, None),
            ("polite", "polite-r8", MODEL),
            ("org/terse", "terse", MODEL),
        ]
        assert served.get("/v1/models/org/terse").json() == listed[2]
        assert "secret" not in served.get("/v1/models").text


def test_an_unknown_name_gets_404_and_the_names_there_are(recording: Recording) -> None:
    with in_process(recording, byte_tokenizer(), adapters=ADAPTERS) as served:
        (answer,) = served.post("/v1/completions", body("polit"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert "'tiny' and its adapters 'polite', 'org/terse'" in answer.json()["error"]["message"]
        assert served.get("/v1/models/polit").status_code == 404
        assert not recording.asked


def test_cached_results_belong_to_one_adapter(recording: Recording) -> None:
    with in_process(recording, byte_tokenizer(), adapters=ADAPTERS, cache_bytes=1 << 20) as served:
        statuses = [
            served.post("/v1/completions", body(name))[0].headers["x-cache"]
            for name in (MODEL, "polite", MODEL, "polite", "org/terse")
        ]
        assert statuses == ["miss", "miss", "hit", "hit", "miss"]


def test_metrics_count_by_model(recording: Recording) -> None:
    with in_process(recording, byte_tokenizer(), adapters=ADAPTERS, cache_bytes=1 << 20) as served:
        served.post("/v1/completions", body("polite", max_tokens=3))
        for _ in range(2):
            served.post("/v1/completions", body(MODEL))
        page = served.get("/metrics").text
        for name, requests, tokens in (("polite", 1, 3), (MODEL, 2, 8)):
            assert f'launcher:requests_by_model_total{{model_name="{name}"}} {requests}.0' in page
            assert f'launcher:generation_tokens_by_model_total{{model_name="{name}"}} {tokens}.0' in page
