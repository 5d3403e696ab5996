"""What the parent says about a folder of weights before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.config.model.gpt2 import Gpt2
from launcher.config.model.hf import Hf
from launcher.config.model.llama import SmolLm2

SIZES: dict[str, Any] = {
    "name": "small",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "max_position_embeddings": 32,
    "vocab_size": 99,
}


def only_problem(model: Gpt2 | Hf | SmolLm2) -> str:
    (problem,) = model.validate_machine()
    return str(problem)


def test_a_missing_folder_and_a_file(saved: Path, tmp_path: Path) -> None:
    missing = only_problem(Gpt2(**SIZES, weights=str(tmp_path / "nowhere")))
    assert missing.startswith(f"model.weights={tmp_path}/nowhere: there is no such folder; give a folder")
    assert "is a file" in only_problem(Gpt2(**SIZES, weights=str(saved / "config.json")))


def test_another_size_and_another_family(saved: Path) -> None:
    other_size = only_problem(Gpt2(**{**SIZES, "num_hidden_layers": 3, "vocab_size": 100}, weights=str(saved)))
    assert "holds another model: num_hidden_layers is 2, not 3, vocab_size is 99, not 100" in other_size
    assert "its family is gpt2, not llama" in only_problem(SmolLm2(weights=str(saved)))


def test_nothing_half_a_file_and_pickles(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "bytes, and its header describes" in only_problem(Gpt2(**SIZES, weights=str(folder)))
    weights.write_text("version https://git-lfs.github.com/spec/v1")
    assert "is a Git LFS pointer" in only_problem(Gpt2(**SIZES, weights=str(folder)))
    weights.unlink()
    assert "holds no weights: looked for latest or *_model_states.pt" in only_problem(
        Gpt2(**SIZES, weights=str(folder))
    )
    (folder / "pytorch_model.bin").touch()
    assert not list(Gpt2(**SIZES, weights=str(folder)).validate_machine())
    (folder / "config.json").unlink()
    assert not list(Gpt2(**SIZES, weights=str(folder)).validate_machine())
    assert "is a folder of weights without config.json" in only_problem(Hf(name=str(folder)))


def test_a_trainers_folder_names_the_checkpoint_below_it(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4}')
    said = only_problem(Hf(name=str(tmp_path / "out")))
    assert "holds checkpoint-4, a Trainer checkpoint" in said
    assert f"set model.name={tmp_path}/out/checkpoint-4" in said


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "org/model/extra", "two words", ""])
def test_names_that_are_no_model(name: str) -> None:
    assert only_problem(Hf(name=name)).startswith(f"model.name={name}: ")


def test_a_local_model_answers_like_its_own_configuration(saved: Path) -> None:
    assert Hf(name=str(saved)).shape() == Gpt2(**SIZES).shape()
    assert Hf(name=str(saved)).architecture() == Gpt2(**SIZES).architecture()
    assert Hf(name="org/model").shape() is None
    assert not list(Hf(name="org/model").validate_machine())


def test_a_random_model_of_a_local_folder_needs_only_its_config(saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "config.json", tmp_path)
    assert not list(Hf(name=str(tmp_path), weights="random").validate_machine())
    assert "holds no weights" in only_problem(Hf(name=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in only_problem(Hf(name=str(tmp_path), weights="random"))


def test_sizes_that_were_never_published_cannot_be_pretrained() -> None:
    with pytest.raises(Exception, match="there are no pretrained weights of this size"):
        Gpt2(**SIZES, weights="pretrained")
