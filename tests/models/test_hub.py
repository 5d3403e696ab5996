"""The hub's local cache, and what is said where the hub cannot be reached."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher.config.model.gpt2 import Gpt2
from launcher.config.model.hf import Hf
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.models.pretrained import tokenizer_folder, weights_folder
from launcher.utils.hub import cached_folder, fetch_model


def test_a_cached_model_is_found_without_the_hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert cached_folder("org/small") is None
    repository = tmp_path / "models--org--small"
    shutil.copytree(saved, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert cached_folder("org/small") == repository / "snapshots" / "abc"
    shape = Hf(name="org/small").shape()
    assert shape is not None
    assert shape.vocab_size == 99


def test_without_the_hub_the_message_says_what_to_type() -> None:
    model = Gpt2(name="gpt2", num_hidden_layers=12, num_attention_heads=12, hidden_size=768, weights="pretrained")
    with pytest.raises(EnvironmentProblem, match=r"hf download openai-community/gpt2.*or set model.weights=random"):
        weights_folder(model, heartbeat=lambda: None)
    with pytest.raises(EnvironmentProblem, match=r"or set data.tokenizer=bpe"):
        tokenizer_folder(model, heartbeat=lambda: None)


def test_an_impossible_name_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"data.tokenizer=a b: the hub has no such public model"):
        fetch_model("a b", with_weights=False, option="data.tokenizer", instead="")
