"""Data sets by their name on the hub, against a local stub of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.config.data.auto import AutoData
from launcher.config.data.examples import RenderedExample, TextSegment
from launcher.config.data.sources import fetch_dataset
from launcher.config.model.hf import Hf
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.models.pretrained import HfSource
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


@pytest.mark.parametrize("what", ["data set", "model"])
def test_a_connection_that_breaks_continues_where_it_broke(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    content, name = ROW.encode() * 60, "train.jsonl" if what == "data set" else "model.safetensors"
    hub.files["datasets/org/chat"]["train.jsonl"] = content
    hub.files["org/model"] = {"config.json": b"{}", "model.safetensors": content}
    hub.broken[name] = 1000
    folder = fetch_dataset("org/chat", option="data.path") if what == "data set" else fetch("org/model")
    assert (folder / name).read_bytes() == content
    asked = [given for file, given in hub.ranges if file == name]
    assert asked == ["", *(f"bytes={start}-" for start in range(1000, len(content), 1000))]


def fetch(name: str) -> Path:
    return fetch_model(name, with_weights=True, option="model.name", instead="set model=gpt2_tiny")


def test_a_download_that_failed_can_be_repeated(hub: HubStub) -> None:
    hub.broken["train.jsonl"] = 0
    with pytest.raises(EnvironmentProblem, match=r"org/chat cannot be downloaded .* run the same"):
        fetch_dataset("org/chat", option="data.path")
    hub.broken.clear()
    hub.ranges.clear()
    assert len(list(AutoData(path="org/chat", chat_template="none").examples())) == 3
    assert [name for name, _ in hub.ranges] == ["train.jsonl"], "the other file was complete"


def test_a_plan_after_a_broken_download_waits_for_the_rest(hub: HubStub) -> None:
    """The cache holds the test split alone: that is not what the data set is."""
    hub.broken["train.jsonl"] = 0
    data = AutoData(path="org/chat", chat_template="none")
    with pytest.raises(EnvironmentProblem):
        list(data.examples())
    assert list(data.validate_machine()) == []
    assert dict(data.describe(None)) == {}
    hub.broken.clear()
    assert len(list(data.examples())) == 3
    assert "data" in dict(AutoData(path="org/chat", chat_template="none").describe(None))


def test_a_model_whose_download_broke_off_is_completed_by_the_next_run(hub: HubStub) -> None:
    parts = {f"model-0000{number}-of-00002.safetensors": bytes([number]) * 3000 for number in (1, 2)}
    hub.files["org/model"] = {"config.json": b"{}", **parts}
    hub.broken["model-00002-of-00002.safetensors"] = 0
    with pytest.raises(EnvironmentProblem, match=r"model.name=org/model cannot be downloaded .* run the same command"):
        fetch("org/model")
    hub.broken.clear()
    hub.ranges.clear()
    folder = fetch("org/model")
    assert {name: (folder / name).read_bytes() for name in parts} == parts
    assert [name for name, _ in hub.ranges] == ["model-00002-of-00002.safetensors"], "the others were complete"


def test_a_model_without_weights_or_without_a_model_is_named(hub: HubStub) -> None:
    hub.files["org/old"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(ConfigError, match=r"model.name=org/old: holds no weights in safetensors .* save_pretrained"):
        fetch("org/old")
    hub.files["org/lora"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
    with pytest.raises(ConfigError, match=r"is an adapter, not a model; set model.name .* model.adapter=./FOLDER"):
        HfSource(Hf(name="org/lora")).config()
    hub.files["org/other"] = {"params.json": b"{}"}
    with pytest.raises(ConfigError, match=r"holds no config.json .* name a model in Transformers' format"):
        HfSource(Hf(name="org/other")).config()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "GatedRepo", r"is gated: .* accept them at http://[\d.:]+/{page}, and log in"),
        (403, "GatedRepo", r"is gated: .* ask for access at http://[\d.:]+/{page} with the account of your token"),
        (401, "RepoNotFound", r"the hub has no such public"),
        (401, "", r"the hub rejects your token"),
        (403, "Forbidden", r"the hub forbids the download; see http://[\d.:]+/{page};"),
    ],
)
def test_what_the_hub_does_not_give_to_this_user(hub: HubStub, status: int, code: str, said: str) -> None:
    hub.refused = {"org/chat": (status, code), "org/model": (status, code)}
    with pytest.raises(ConfigError, match="^data.path=org/chat: .*" + said.format(page="datasets/org/chat")):
        list(AutoData(path="org/chat").examples())
    with pytest.raises(ConfigError, match="^model.name=org/model: .*" + said.format(page="org/model")):
        fetch("org/model")


def test_a_hub_that_is_ill_is_not_the_users_mistake(hub: HubStub) -> None:
    hub.refused = {"org/chat": (500, "InternalError"), "org/model": (500, "InternalError")}
    with pytest.raises(EnvironmentProblem, match=r"data.path=org/chat cannot be downloaded \(.*500"):
        list(AutoData(path="org/chat").examples())
    with pytest.raises(EnvironmentProblem, match=r"model.name=org/model cannot be downloaded \(.*500"):
        fetch("org/model")


def test_a_listed_file_of_a_model_that_is_missing_is_named(hub: HubStub) -> None:
    hub.files["org/model"] = {"config.json": b"{}", "model.safetensors": b"x"}
    hub.missing.add("model.safetensors")
    with pytest.raises(EnvironmentProblem, match=r"model\.safetensors"):
        fetch("org/model")


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
