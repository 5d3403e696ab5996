"""Files of whole weights and of torch's own optimizers, in each form that ``torch.save`` gives them."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from launcher.checkpoint.foreign.source import open_foreign
from launcher.checkpoint.foreign.tensors import ForeignTensors
from launcher.checkpoint.foreign.torch_pickle import BadCheckpoint, load_torch_file
from launcher.protocol.foreign_files import find_foreign


def read(folder: Path, *, with_moments: bool = True) -> ForeignTensors:
    found = find_foreign(folder)
    assert found is not None
    return open_foreign(found, with_moments=with_moments)


def save(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, *, steps: int) -> Path:
    """Write a folder of accelerate's, after some steps."""
    for _ in range(steps):
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    torch.save(module.state_dict(), folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    return folder


def test_moments_of_named_parameters_have_their_names(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.named_parameters())
    found = read(save(tmp_path, module, optimizer, steps=2))
    assert found.order is None
    assert torch.equal(found.weights.read("weight"), module.weight)
    assert torch.equal(found.moments.read("exp_avg.bias"), optimizer.state[module.bias]["exp_avg"])
    assert found.optimizer_step() == 2


def test_moments_of_others_have_numbers_in_the_order_of_the_groups(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [module.bias]}, {"params": [module.weight], "weight_decay": 0.0}])
    found = read(save(tmp_path, module, optimizer, steps=1))
    assert found.order == [["0"], ["1"]]
    assert torch.equal(found.moments.read("exp_avg_sq.1"), optimizer.state[module.weight]["exp_avg_sq"])
    assert not read(tmp_path, with_moments=False).moments.shapes


def test_an_optimizer_before_its_first_step_has_no_moments(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    found = read(save(tmp_path, module, torch.optim.AdamW(module.parameters()), steps=0))
    assert (dict(found.moments.shapes), found.order, found.optimizer_step()) == ({}, None, None)


@pytest.mark.parametrize("value", ["text", torch.eye(2).to_sparse()])
def test_a_weight_that_is_no_dense_tensor_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save({"weight": value}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match=r"pytorch_model\.bin cannot be read: a dense tensor is expected, not "):
        read(tmp_path)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").mkdir()
    with pytest.raises(BadCheckpoint, match=r"pytorch_model\.bin is missing, or is no regular file"):
        read(tmp_path)


@pytest.mark.parametrize("by_attribute", [False, True])
def test_a_member_of_deepspeeds_enumeration_is_read_without_deepspeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_attribute: bool
) -> None:
    """Python 3.11.0 to 3.11.3 pickle it as an attribute of its class, all others by its value."""

    class ZeroStageEnum(int, enum.Enum):
        weights = 3

        def __reduce_ex__(self, protocol: object) -> Any:
            return (getattr, (type(self), self.name)) if by_attribute else (type(self), (self.value,))

    module = ModuleType("deepspeed.runtime.zero.config")
    ZeroStageEnum.__module__, ZeroStageEnum.__qualname__ = module.__name__, "ZeroStageEnum"
    module.ZeroStageEnum = ZeroStageEnum  # type: ignore[attr-defined]
    with monkeypatch.context() as loaded:
        for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero"):  # which pickle imports
            loaded.setitem(sys.modules, name, ModuleType(name))
        loaded.setitem(sys.modules, module.__name__, module)
        torch.save({"zero_stage": ZeroStageEnum.weights, "step": 3}, tmp_path / "a.pt")
    found = load_torch_file(tmp_path / "a.pt")
    assert found["step"] == 3
    assert not isinstance(found["zero_stage"], int)
