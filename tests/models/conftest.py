"""A small model, its weights on disk, and a way to spoil them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.config.activation import NoCheckpointing
from launcher.config.attention import SdpaAttention
from launcher.config.model.gpt2 import Gpt2

SIZES = {
    "name": "small",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "max_position_embeddings": 32,
    "vocab_size": 99,
}
Spoil = Callable[[Callable[[dict[str, torch.Tensor]], object]], Path]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that ``save_pretrained`` wrote."""
    from launcher.models.build import build_model  # seconds, which tests of plans need not wait for

    folder = tmp_path_factory.mktemp("weights")
    build_model(Gpt2(**SIZES), seed=1, attention=SdpaAttention(), activation=NoCheckpointing()).save_pretrained(folder)
    return folder


@pytest.fixture
def spoilt(saved: Path, tmp_path: Path) -> Spoil:
    """Copy the folder with its tensors changed."""

    def spoil(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        folder = tmp_path / "spoilt"
        shutil.copytree(saved, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return spoil
