"""Data sets by their name on the hub, against a local stub of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.config.data.auto import AutoData
from launcher.config.data.examples import RenderedExample, TextSegment
from launcher.config.data.sources import fetch_dataset
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.utils.hub import fetch_model
from tests.hub_stub import HubStub, serve_hub

ROW = json.dumps({"prompt": "q", "response": "a" * 40}) + "\n"
README = """---
configs:
- config_name: easy
  data_files:
  - {split: train, path: easy/*.jsonl}
  - {split: test, path: test.jsonl}
- config_name: hard
  data_files: hard.jsonl
---
# A data set
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    import huggingface_hub.constants as constants

    stub = HubStub({"datasets/org/chat": {"train.jsonl": ROW.encode() * 3, "test.jsonl": ROW.encode(), ".git": b""}})
    with serve_hub(stub):
        monkeypatch.setattr(constants, "ENDPOINT", stub.url)
        pattern = f"{stub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_ENDPOINT", stub.url)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
        yield stub


def test_a_data_set_of_the_hub_is_downloaded_and_read_by_its_split(hub: HubStub) -> None:
    data = AutoData(path="org/chat", chat_template="none")
    assert list(data.validate_machine()) == [], "a plan downloads nothing"
    assert hub.ranges == []
    expected = RenderedExample((TextSegment("q", False), TextSegment("a" * 40, True)))
    assert list(data.examples()) == [expected] * 3
    assert len(list(AutoData(path="org/chat", chat_template="none", split="test").examples())) == 1
    assert list(dict(data.describe(None))) == ["data", "chat template", "first example"], "now it is here"


def test_a_connection_that_breaks_continues_where_it_broke(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    content = ROW.encode() * 60
    hub.files["datasets/org/chat"]["train.jsonl"] = content
    hub.broken["train.jsonl"] = 1000
    folder = fetch_dataset("org/chat", option="data.path")
    assert (folder / "train.jsonl").read_bytes() == content
    asked = [given for name, given in hub.ranges if name == "train.jsonl"]
    assert asked == ["", *(f"bytes={start}-" for start in range(1000, len(content), 1000))]


def test_a_download_that_failed_can_be_repeated(hub: HubStub) -> None:
    hub.broken["train.jsonl"] = 0
    with pytest.raises(EnvironmentProblem, match=r"org/chat cannot be downloaded .* run the same"):
        fetch_dataset("org/chat", option="data.path")
    hub.broken.clear()
    hub.ranges.clear()
    assert len(list(AutoData(path="org/chat", chat_template="none").examples())) == 3
    assert [name for name, _ in hub.ranges] == ["train.jsonl"], "the other file was complete"


def test_a_model_whose_download_broke_off_is_an_error_to_read(hub: HubStub) -> None:
    hub.files["org/model"] = {"config.json": b"{}" * 900}
    hub.broken["config.json"] = 100
    with pytest.raises(EnvironmentProblem, match="org/model is not in the local cache"):
        fetch_model("org/model", with_weights=False, option="model.name", instead="wait")


def test_a_listed_file_that_is_missing_is_named(hub: HubStub) -> None:
    hub.missing.add("train.jsonl")
    with pytest.raises(EnvironmentProblem, match=r"train\.jsonl"):
        list(AutoData(path="org/chat").examples())


def test_a_name_that_the_hub_does_not_have(hub: HubStub) -> None:
    with pytest.raises(ConfigError, match="the hub has no such public data set"):
        list(AutoData(path="org/chut").examples())


def test_configurations_of_the_readme(hub: HubStub) -> None:
    files = {"easy/a.jsonl": ROW, "easy/b.jsonl": ROW, "test.jsonl": ROW, "hard.jsonl": ROW * 5}
    hub.files["datasets/org/many"] = {"README.md": README.encode(), **{n: t.encode() for n, t in files.items()}}

    def count(**options: str) -> int:
        return len(list(AutoData(path="org/many", chat_template="none", **options).examples()))  # type: ignore[arg-type]

    assert count(name="easy") == 2
    assert count(name="easy", split="test") == 1
    assert count(name="hard") == 5
    for options, said in (
        ({}, "has the configurations easy, hard; set data.name=easy"),
        ({"name": "hart"}, "has the configurations easy, hard"),
        ({"name": "hard", "split": "test"}, "has the splits train"),
    ):
        with pytest.raises(ConfigError, match=said):
            count(**options)
