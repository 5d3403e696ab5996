"""Files of DeepSpeed in forms that the programs of these tests do not write, and those that do not fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.checkpoint.foreign.source import open_foreign
from launcher.checkpoint.foreign.tensors import ForeignTensors
from launcher.checkpoint.foreign.torch_pickle import BadCheckpoint
from launcher.protocol.foreign_files import find_foreign

WHOLE = "mp_rank_00_model_states.pt"
GROUPS = [{"module.a": torch.Size((2, 3))}, {"module.b": torch.Size((3,))}]
A, B = torch.arange(6.0).view(2, 3), torch.arange(10.0, 13.0)


def read(folder: Path) -> ForeignTensors:
    found = find_foreign(folder)
    assert found is not None
    return open_foreign(found)


def refusal(folder: Path) -> str:
    with pytest.raises(BadCheckpoint) as refused:
        read(folder)
    return str(refused.value)


def states(*vectors: Tensor, step: int | None = 4) -> dict[str, Any]:
    """Return AdamW's state of each vector: moments are ten and a hundred times its values."""
    of_one = {} if step is None else {"step": torch.tensor(float(step))}
    return {
        "state": {
            number: {**of_one, "exp_avg": 10 * each, "exp_avg_sq": 100 * each} for number, each in enumerate(vectors)
        },
        "param_groups": [{"params": [number]} for number in range(len(vectors))],
    }


def by_group(*vectors: Tensor, **changed: Any) -> dict[str, Any]:
    """Return what a rank saves with ZeRO-1 and 2."""
    tree = {"single_partition_of_fp32_groups": list(vectors), "partition_count": [2, 2]}
    return {**tree, "base_optimizer_state": states(*vectors), **changed}


def by_parameter(*vectors: Tensor, **changed: Any) -> dict[str, Any]:
    """Return what a rank saves with ZeRO-3."""
    return {
        "fp32_flat_groups": list(vectors),
        "partition_count": 2,
        "optimizer_state_dict": states(*vectors),
        **changed,
    }


def save(folder: Path, main: list[dict[str, Any]], optimizer: list[dict[str, Any]] = []) -> Path:  # noqa: B006
    """Write the model's file, or one a rank, and the optimizer's."""
    folder.mkdir(exist_ok=True)
    for rank, tree in enumerate(main):
        name = WHOLE if len(main) == 1 else f"zero_pp_rank_{rank}_{WHOLE}"
        torch.save({"global_steps": 4, "module": {}, **tree}, folder / name)
    for rank, tree in enumerate(optimizer):
        torch.save({"optimizer_state_dict": tree}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


FIRST, SECOND = (A.flatten()[:3], B[:2]), (A.flatten()[3:], torch.tensor([B[2], 0.0]))
"""Vectors of two ranks with ZeRO-1; the last has an element of padding."""


def test_an_elastic_checkpoint_with_frozen_and_tied_parameters(tmp_path: Path) -> None:
    """The step stands once, the frozen parameter whole, and of the tied ones one has no values of its own."""
    trees = []
    for vectors in (FIRST, SECOND):
        elastic = [{"exp_avg": 10 * each, "exp_avg_sq": 100 * each} for each in vectors]
        trees.append(by_group(*vectors, base_optimizer_state=elastic, base_optimizer_state_step=4))
    main = {
        "module": {
            "module.a": A.half(),
            "module.b": B.half(),
            "module.tied": A.half(),
            "module.buffer": B,
            "module.none": None,
        },
        "param_shapes": GROUPS,
        "frozen_param_shapes": {"module.frozen": torch.Size((2,)), "module.lost": torch.Size((2,))},
        "frozen_param_fragments": {"module.frozen": torch.tensor([7.0, 8.0])},
        "shared_params": {"module.tied": "module.a"},
    }
    found = read(save(tmp_path, [main], trees))
    assert set(found.weights.shapes) == {"a", "b", "tied", "buffer", "frozen"}
    for name, values in {"a": A, "b": B, "tied": A, "buffer": B, "frozen": torch.tensor([7.0, 8.0])}.items():
        assert torch.equal(found.weights.read(name), values), name
    assert torch.equal(found.moments.read("exp_avg_sq.a"), 100 * A)
    assert torch.equal(found.moments.read("exp_avg.b"), 10 * B)
    assert (found.step, found.optimizer_step()) == (4, 4)


def test_parameters_in_several_vectors_of_a_rank(tmp_path: Path) -> None:
    """ZeRO-3 cuts a rank's parts where a vector is full, also within a parameter; the last part may be all padding."""
    ranks = [torch.cat([A.flatten()[2 * rank : 2 * rank + 2], B[rank : rank + 1]]) for rank in range(3)]
    frozen = torch.tensor([5.0, 6.0, 7.0, 8.0])
    main = {"param_shapes": GROUPS, "frozen_param_shapes": {"frozen": torch.Size((4,))}}
    parts = [frozen[:2], frozen[2:], torch.zeros(2)]
    trees = [{**main, "frozen_param_fragments": {"frozen": part}} for part in parts]
    found = read(save(tmp_path, trees, [by_parameter(each[:1], each[1:], partition_count=3) for each in ranks]))
    for name, values in {"a": A, "b": B, "frozen": frozen}.items():
        assert torch.equal(found.weights.read(name), values), name
    assert torch.equal(found.moments.read("exp_avg.a"), 10 * A)


@pytest.mark.parametrize("kept", [{"state": {}, "param_groups": []}, None])
def test_without_moments_there_are_weights_alone(tmp_path: Path, kept: Any) -> None:
    trees = [by_group(*vectors, base_optimizer_state=kept) for vectors in (FIRST, SECOND)]
    found = read(save(tmp_path, [{"param_shapes": GROUPS}], trees))
    assert torch.equal(found.weights.read("a"), A)
    assert (dict(found.moments.shapes), found.optimizer_step()) == ({}, None)


def test_a_step_of_a_fused_optimizer_stands_in_its_groups(tmp_path: Path) -> None:
    trees = []
    for vectors in (FIRST, SECOND):
        kept = states(*vectors, step=None)
        kept["param_groups"][0]["step"] = 9
        trees.append(by_group(*vectors, base_optimizer_state=kept))
    assert read(save(tmp_path, [{"param_shapes": GROUPS}], trees)).optimizer_step() == 9


def test_moments_without_names_of_an_fp16_optimizer_are_left_out(tmp_path: Path) -> None:
    found = read(save(tmp_path, [{"module": {"module.a": A}, "optimizer": {"fp32_groups_flat": [A.flatten()]}}]))
    assert torch.equal(found.weights.read("a"), A)
    assert not found.moments.shapes


def changed(make: Any, **options: Any) -> list[dict[str, Any]]:
    return [make(*vectors, **options) for vectors in (FIRST, SECOND)]


WITHOUT_SQUARES = {"state": {key: {"step": 1, "exp_avg": B} for key in (0, 1)}, "param_groups": [{"params": [0, 1]}]}


@pytest.mark.parametrize(
    ("optimizer", "groups", "why"),
    [
        ([{"partition_count": 2}] * 2, GROUPS, "it holds no fp32 weights of ZeRO"),
        (changed(by_group, ds_zero_partition_groups=[0]), GROUPS, "divided among groups of experts, which is not read"),
        (changed(by_parameter, partition_count=3), GROUPS, "it is of 3 ranks, and there are files of 2"),
        (
            changed(by_group, base_optimizer_state=WITHOUT_SQUARES),
            GROUPS,
            "its optimizer is not AdamW: it keeps exp_avg, step, without exp_avg_sq",
        ),
        (changed(by_group), GROUPS[:1], "it has 2 vectors for 1 groups of parameters"),
        (
            changed(by_group),
            [GROUPS[0], {"b": torch.Size((5,))}],
            "its parameters have 5 elements, and its vectors 4",
        ),
        (
            changed(by_parameter),
            [*GROUPS, {"c": torch.Size((2,))}],
            "rank 0 has 5 elements, too few for its part of c",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(
    tmp_path: Path, optimizer: list[dict[str, Any]], groups: Any, why: str
) -> None:
    message = refusal(save(tmp_path, [{"param_shapes": groups}], optimizer))
    assert message.endswith(why)
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt cannot be read" in message


def test_parts_of_a_model_need_those_of_the_optimizer(tmp_path: Path) -> None:
    message = refusal(save(tmp_path, [{"param_shapes": GROUPS}] * 2))
    assert "the parts of its parameters (zero_pp_rank_…_optim_states.pt) are missing" in message


def test_a_model_without_an_optimizer_is_weights_alone(tmp_path: Path) -> None:
    found = read(save(tmp_path, [{"module": {"module.a": A}, "optimizer": None}]))
    assert torch.equal(found.weights.read("a"), A)
    assert not found.moments.shapes
