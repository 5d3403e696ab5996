"""No file of a checkpoint runs code when it is loaded; one that is damaged is named."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launcher.engines.checkpoint_io import load_file, load_rng
from launcher.engines.deepspeed.base import DeepSpeedEngineBase, deepspeed_tensors_only
from launcher.errors import EXIT_BAD_INPUT, JobError


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


@pytest.fixture
def hostile(tmp_path):
    """A file that makes the folder ``made`` where it is unpickled in full."""
    torch.save({"cpu": Hostile(tmp_path / "made"), "tensor": torch.zeros(1)}, tmp_path / "rng_00000.pt")
    yield tmp_path / "rng_00000.pt"
    assert not (tmp_path / "made").exists(), "the file ran code"


def test_a_file_that_would_run_code_is_refused_and_named(hostile):
    for load in (lambda: load_file(hostile), lambda: load_rng(hostile.parent, rank=0, device=torch.device("cpu"))):
        with pytest.raises(
            JobError, match=r"rng_00000\.pt holds an object of posix\.mkdir, which could run code"
        ) as error:
            load()
        assert error.value.exit_code == EXIT_BAD_INPUT


@pytest.mark.parametrize("content", [b"", b"nothing of torch's", b"PK\x03\x04 half a zip", b"\x80\x02."])
def test_a_damaged_file_is_named(tmp_path, content):
    file = tmp_path / "optimizer.pt"
    file.write_bytes(content)
    with pytest.raises(JobError, match=r"optimizer\.pt") as error:
        load_file(file)
    assert error.value.exit_code == EXIT_BAD_INPUT


def test_another_content_than_a_generators_state_is_named(tmp_path):
    for state in ({}, [], {"cpu": torch.zeros(3)}, {"cpu": "text"}):
        torch.save(state, tmp_path / "rng_00000.pt")
        with pytest.raises(JobError, match=r"rng_00000\.pt cannot be read"):
            load_rng(tmp_path, rank=0, device=torch.device("cpu"))


def test_deepspeeds_loader_takes_its_own_classes_and_runs_no_code(tmp_path, hostile):
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    loader = TorchCheckpointEngine()
    scaler = DynamicLossScaler(1024.0, 2.0, 1000, 1.0, 2)
    address = fragment_address(numel=1, start=2)
    state = {"stage": ZeroStageEnum(3), "scalers": [LossScaler(1.0), scaler], "address": address}
    torch.save(state, tmp_path / "states.pt")
    with deepspeed_tensors_only():
        found = loader.load(str(tmp_path / "states.pt"))
    assert (found["stage"], found["address"], found["scalers"][1].cur_scale) == (state["stage"], address, 1024.0)
    peer = SimpleNamespace(load_checkpoint=lambda *_, **__: (loader.load(str(hostile)), {}))
    engine = SimpleNamespace(_engine=peer, _context=SimpleNamespace(rank=0), device=torch.device("cpu"))
    with pytest.raises(JobError, match=r"deepspeed holds an object of posix\.mkdir") as error:
        DeepSpeedEngineBase.load(engine, tmp_path)
    assert error.value.exit_code == EXIT_BAD_INPUT
    torch.save(state, tmp_path / "states.pt")
    assert loader.load(str(tmp_path / "states.pt"))["address"] == address, "outside of the block nothing is changed"


class Attribute:
    """Is pickled as ``getattr(owner, name)``, as Python 3.11.2 does it with members of enumerations."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_members_of_enumerations_are_read_from_every_python_and_no_other_attribute(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save({"stage": Attribute(ZeroStageEnum, "weights")}, tmp_path / "member.pt")
    torch.save({"stage": Attribute(LossScaler, "__init__")}, tmp_path / "function.pt")
    torch.save({"stage": Attribute(ZeroStageEnum, "__init__")}, tmp_path / "dunder.pt")
    with deepspeed_tensors_only():
        assert load_file(tmp_path / "member.pt") == {"stage": ZeroStageEnum.weights}
        for name in ("function.pt", "dunder.pt"):
            with pytest.raises(JobError, match="getattr, which could run code"):
                load_file(tmp_path / name)
