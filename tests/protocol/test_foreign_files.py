"""Which program wrote a folder, by the names of its files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launcher.protocol.foreign_files import ForeignCheckpoint, find_foreign

ZERO1 = ("latest=global_step7", *(f"global_step7/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)))


def write(folder: Path, *names: str) -> ForeignCheckpoint | None:
    """Write files (``name`` or ``name=content``) and return what they are taken for."""
    for name, _, content in (name.partition("=") for name in names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return find_foreign(folder)


@pytest.mark.parametrize(
    ("names", "title", "step", "moments"),
    [
        ((*ZERO1, "global_step7/mp_rank_00_model_states.pt"), "DeepSpeed checkpoint of ZeRO on 2 ranks", 7, True),
        (("mp_rank_00_model_states.pt",), "DeepSpeed checkpoint", None, True),
        (
            ("global_step9/mp_rank_00_model_states.pt", "global_step10/mp_rank_00_model_states.pt"),
            "DeepSpeed",
            10,
            True,
        ),
        (("latest=pytorch_model", "pytorch_model/mp_rank_00_model_states.pt"), "DeepSpeed checkpoint", None, True),
        ((".metadata", "__0_0.distcp"), "torch.distributed.checkpoint folder", None, True),
        (("step-40/.metadata", "step-50/.metadata"), "torch.distributed.checkpoint folder", 50, True),
        (("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"), "FSDP checkpoint of accelerate", None, True),
        (("pytorch_model_fsdp_0/.metadata", "random_states_0.pkl"), "FSDP checkpoint of accelerate", None, False),
        (("shard-00001-model-00001-of-00001.safetensors",), "folder of safetensors", None, False),
        (("sharded/shard-00001-model-00001-of-00001.safetensors",), "folder of safetensors", None, False),
        (("model.safetensors", "optimizer.bin"), "accelerate checkpoint", None, True),
        (("pytorch_model.bin", "scheduler.bin"), "accelerate checkpoint", None, False),
        (("model.safetensors",), "folder of weights", None, False),
        (
            ("checkpoint-9/model.safetensors", "checkpoint-10/optimizer.pt", "checkpoint-10/pytorch_model.bin"),
            "folder of weights",
            10,
            True,
        ),
        (
            ("model.safetensors", "optimizer.pt", 'trainer_state.json={"global_step": 500}'),
            "Trainer checkpoint",
            500,
            True,
        ),
        (
            ('trainer_state.json={"global_step": 8}', *ZERO1, "global_step7/mp_rank_00_model_states.pt"),
            "DeepSpeed checkpoint of ZeRO on 2 ranks",
            8,
            True,
        ),
    ],
)
def test_a_folder_is_known_by_its_files(
    tmp_path: Path, names: tuple[str, ...], title: str, step: int | None, *, moments: bool
) -> None:
    found = write(tmp_path, *names)
    assert found is not None
    assert title in found.title
    assert (found.step, found.may_hold_moments) == (step, moments)
    assert all(file.is_file() for file in found.weight_files())


@pytest.mark.parametrize("names", [(), ("config.json",), ("a/b.txt",), ("adapter_model.bin",)])
def test_other_folders_are_none(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert write(tmp_path, *names) is None


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("latest=../a",), "its file latest names '../a', which is not a folder in it"),
        (("latest=a",), "its file latest names 'a', which is not a folder in it"),
        (("latest=a", "a/b"), "holds no mp_rank_00_model_states.pt"),
        (("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"), "is cut by tensor parallelism"),
        (("mp_rank_00_model_states.pt", "layer_01-model_states.pt"), "is of DeepSpeed's pipeline or experts"),
        (("mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"), "lacks the file of rank 0"),
        (("pytorch_model_fsdp_0/a",), "pytorch_model_fsdp_0 has no .metadata, so it was not finished"),
        (("model.safetensors.index.json=[]",), "model.safetensors.index.json has no weight_map"),
        (('pytorch_model.bin.index.json={"weight_map": {"a": "b.bin"}}',), "b.bin is missing"),
        (("model.safetensors", "trainer_state.json={}"), "trainer_state.json has no global_step"),
        (("model.safetensors", "trainer_state.json={"), "trainer_state.json is not JSON"),
    ],
)
def test_what_is_incomplete_or_cut_otherwise_is_refused(tmp_path: Path, names: tuple[str, ...], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        write(tmp_path, *names)


def test_an_index_names_the_files_of_the_weights(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin", "c": "one.bin"}})
    found = write(tmp_path, f"pytorch_model.bin.index.json={index}", "one.bin", "two.bin", "three.bin")
    assert found is not None
    assert [file.name for file in found.weight_files()] == ["one.bin", "two.bin"]
