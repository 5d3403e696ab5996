"""Folders of ``torch.distributed.checkpoint`` whose ``.metadata`` says what cannot be, or is not read."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from launcher.checkpoint.foreign import dcp as reader
from launcher.checkpoint.foreign.source import open_foreign
from launcher.checkpoint.foreign.tensors import ForeignTensors
from launcher.checkpoint.foreign.torch_pickle import BadCheckpoint
from launcher.protocol.foreign_files import find_foreign

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def read(folder: Path) -> ForeignTensors:
    found = find_foreign(folder)
    assert found is not None
    return open_foreign(found)


def refusal(folder: Path) -> str:
    with pytest.raises(BadCheckpoint) as refused:
        read(folder)
    return str(refused.value)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    """Write a folder of a dictionary."""

    def write(tree: Any) -> Path:
        dcp.save(tree, checkpoint_id=tmp_path / "dcp")
        return tmp_path / "dcp"

    return write


WEIGHT = {"model": {"weight": torch.arange(6.0).view(2, 3)}}
STEP = {**WEIGHT, "optimizer": {"state.weight.step": torch.tensor(3.0)}}


def without_format(metadata: Any) -> Any:
    metadata.state_dict_metadata["model.weight"].properties.dtype = None
    return metadata


def transformed(metadata: Any) -> Any:
    places = {
        key: replace(place, transform_descriptors=("zstd", "crypt")) for key, place in metadata.storage_data.items()
    }
    return replace(metadata, storage_data=places)


def in_two_parts(metadata: Any) -> Any:
    metadata.state_dict_metadata["optimizer.state.weight.step"].chunks *= 2
    return metadata


@pytest.mark.parametrize(
    ("tree", "change", "why"),
    [
        (WEIGHT, without_format, "model.weight has no format"),
        (WEIGHT, transformed, "model.weight is stored by zstd, crypt, which is not read"),
        (STEP, in_two_parts, "optimizer.state.weight.step has 2 parts"),
    ],
)
def test_what_metadata_may_not_say(save: Callable[[Any], Path], tree: Any, change: Any, why: str) -> None:
    folder = save(tree)
    assert torch.equal(read(folder).weights.read("weight"), WEIGHT["model"]["weight"])
    metadata = folder / ".metadata"
    metadata.write_bytes(pickle.dumps(change(pickle.loads(metadata.read_bytes()))))
    message = refusal(folder)
    assert message.endswith(why)
    assert ".metadata cannot be read" in message


def test_a_moment_that_is_no_tensor_is_refused(save: Callable[[Any], Path]) -> None:
    tree = {**WEIGHT, "optimizer": {"state.weight.exp_avg": "text"}}
    assert refusal(save(tree)).endswith("optimizer.state.weight.exp_avg is no tensor")


def test_a_step_that_is_no_number_is_refused(save: Callable[[Any], Path]) -> None:
    tree = {**WEIGHT, "optimizer": {"state.weight.step": "3"}}
    assert refusal(save(tree)).endswith("the optimizer's step of weight is no number")


def test_metadata_too_large_to_be_one_is_not_read(save: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(WEIGHT)
    size = (folder / ".metadata").stat().st_size
    monkeypatch.setattr(reader, "_MAX_METADATA_BYTES", size - 1)
    assert refusal(folder).endswith(f".metadata cannot be read: it has {size} bytes")


def test_what_is_neither_weight_nor_moment_is_left_out(save: Callable[[Any], Path]) -> None:
    """A scheduler's tensors are none of the model, where the model has a place of its own."""
    tree = {**WEIGHT, "scheduler": {"last": torch.ones(2)}, "epoch": 3}
    assert set(read(save(tree)).weights.shapes) == {"weight"}
