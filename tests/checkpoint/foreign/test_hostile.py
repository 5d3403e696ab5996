"""Files of other programs that would run code, lie about sizes or lead elsewhere: each is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from launcher.checkpoint.foreign.source import open_foreign
from launcher.checkpoint.foreign.torch_pickle import BadCheckpoint, load_torch_file
from launcher.errors import EXIT_BAD_INPUT
from launcher.protocol.foreign_files import find_foreign

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


@pytest.fixture
def made(tmp_path: Path) -> Any:
    yield tmp_path / "made"
    assert not (tmp_path / "made").exists(), "a file ran code"


def read_all(folder: Path) -> None:
    found = find_foreign(folder)
    assert found is not None
    tensors = open_foreign(found)
    for state in (tensors.weights, tensors.moments):
        for name in state.shapes:
            state.read(name)


def refusal(folder: Path) -> str:
    with pytest.raises(BadCheckpoint) as refused:
        read_all(folder)
    assert refused.value.exit_code == EXIT_BAD_INPUT
    return str(refused.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small folder of torch.distributed.checkpoint."""
    dcp.save({"model": {"weight": torch.arange(6.0).view(2, 3)}}, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def whole(folder: Path, *, moments: Any = None) -> Path:
    """Write a folder of accelerate's."""
    folder.mkdir()
    torch.save({"weight": torch.ones(2)}, folder / "pytorch_model.bin")
    torch.save(moments, folder / "optimizer.bin")
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.bin"])
def test_a_file_of_torch_that_would_run_code_is_refused(tmp_path: Path, made: Path, name: str) -> None:
    folder = whole(tmp_path / "a", moments={"state": {}, "param_groups": []})
    torch.save({"weight": Runs(made)}, folder / name)
    assert refusal(folder).endswith(f"{name} holds an object of posix.mkdir, which could run code; it is not loaded")


def test_a_file_of_deepspeed_may_not_look_up_attributes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    class Looks:
        def __reduce__(self) -> Any:
            return getattr, (torch.Size, "__init__")

    torch.save({"module": Looks(), "global_steps": 1}, tmp_path / "a" / "mp_rank_00_model_states.pt")
    assert "which could run code" in refusal(tmp_path / "a")


def test_objects_of_deepspeed_are_read_without_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("deepspeed.runtime.fp16.loss_scaler")
    scaler = type("DynamicLossScaler", (), {"__module__": module.__name__, "__init__": lambda self: None})
    module.DynamicLossScaler = scaler  # type: ignore[attr-defined]
    made = scaler()
    made.cur_scale = 8.0
    with monkeypatch.context() as loaded:
        for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16"):  # which pickle imports
            loaded.setitem(sys.modules, name, ModuleType(name))
        loaded.setitem(sys.modules, module.__name__, module)
        torch.save({"loss_scaler": made, "step": 3}, tmp_path / "a.pt")
    assert load_torch_file(tmp_path / "a.pt")["step"] == 3


def test_metadata_that_would_run_code_is_refused(saved: Path, made: Path) -> None:
    (saved / ".metadata").write_bytes(pickle.dumps({"a": Runs(made)}))
    assert refusal(saved).endswith(".metadata holds an object of posix.mkdir, which could run code; it is not loaded")


def test_metadata_cannot_change_a_class_of_this_process(saved: Path) -> None:
    before = vars(Metadata).copy()
    name = b"torch.distributed.checkpoint.metadata\nMetadata\n"
    planted = b"\x80\x02c" + name + b"N}X\x08\x00\x00\x00__init__K\x01s\x86b."
    (saved / ".metadata").write_bytes(planted)
    assert ".metadata cannot be read" in refusal(saved)
    assert vars(Metadata) == before


def test_a_part_that_would_run_code_is_refused(saved: Path, made: Path) -> None:
    file = saved / "__0_0.distcp"
    room = file.stat().st_size
    torch.save({"weight": Runs(made)}, file)
    assert file.stat().st_size <= room
    file.write_bytes(file.read_bytes().ljust(room, b"\0"))
    assert "__0_0.distcp (model.weight)" in refusal(saved)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("kept", [0, 1, 40, 300])
def test_a_truncated_folder_is_named(saved: Path, name: str, kept: int) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:kept])
    assert name in refusal(saved)


@pytest.mark.parametrize("kept", [0, 1, 40, 300])
def test_a_truncated_file_of_torch_is_named(tmp_path: Path, kept: int) -> None:
    folder = whole(tmp_path / "a")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:kept])
    assert "pytorch_model.bin" in refusal(folder)


def test_a_part_of_another_shape_is_refused(saved: Path) -> None:
    data = (saved / ".metadata").read_bytes()
    assert data.count(b"K\x02K\x03\x86") >= 1  # sizes (2, 3)
    (saved / ".metadata").write_bytes(data.replace(b"K\x02K\x03\x86", b"K\x03K\x02\x86"))
    assert "a part is torch.float32 (2, 3), not torch.float32 (3, 2)" in refusal(saved)


def test_a_compressed_entry_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1 << 16)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.namelist():
            bomb.writestr(entry, plain.read(entry))
    with pytest.raises(BadCheckpoint, match=r"bomb\.pt cannot be read: its entry .* is compressed"):
        load_torch_file(tmp_path / "bomb.pt")


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    torch.save({"weight": torch.zeros(1).expand(1 << 40)}, tmp_path / "a" / "pytorch_model.bin")
    assert "a tensor of shape (1099511627776,) has 4 bytes" in refusal(tmp_path / "a")


def test_links_and_paths_out_of_the_folder_are_refused(tmp_path: Path, saved: Path) -> None:
    folder = whole(tmp_path / "a")
    (folder / "pytorch_model.bin").rename(tmp_path / "elsewhere.bin")
    (folder / "pytorch_model.bin").symlink_to(tmp_path / "elsewhere.bin")
    assert "is a link or path out of" in refusal(folder)
    (saved / "__0_0.distcp").rename(tmp_path / "_0.distcp")
    (saved / ".metadata").write_bytes((saved / ".metadata").read_bytes().replace(b"__0_0.distcp", b"../_0.distcp"))
    assert "../_0.distcp is a link or path out of" in refusal(saved)


def test_an_index_that_names_a_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../b.bin"}}))
    with pytest.raises(ValueError, match=r"names '\.\./b\.bin', which is not a file of the folder"):
        find_foreign(tmp_path)


@pytest.mark.parametrize("tree", [{"state": [], "param_groups": []}, {"state": {0: {"momentum": 1}}}, 3, {}])
def test_a_state_of_another_optimizer_is_refused(tmp_path: Path, tree: Any) -> None:
    assert "optimizer.bin cannot be read" in refusal(whole(tmp_path / "a", moments=tree))


def test_an_optimizer_that_is_not_adamw_is_named(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(2)
    optimizer.step()
    message = refusal(whole(tmp_path / "a", moments=optimizer.state_dict()))
    assert "its optimizer is not AdamW: it keeps momentum_buffer, without step" in message
