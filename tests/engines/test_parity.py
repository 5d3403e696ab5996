"""Every strategy takes the same steps: fp32, two ranks, five steps, from the same weights, against one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from .conftest import losses

STEPS = 5
ZERO3 = {"kind": "zero", "stage": 3, "persistence_threshold": 0}  # the test model is small: partition all of it
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero0": {"kind": "zero", "stage": 0},
    "zero1": {"kind": "zero", "stage": 1},
    "zero2": {"kind": "zero", "stage": 2},
    "zero3": ZERO3,
    "zero3_offload": {**ZERO3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "zero3_sub_groups": {"kind": "zero", "stage": 3, "persistence_threshold": 1000, "sub_group_size": 20_000},
}
SPLITS = {
    "1x8": {"micro_batch": 1, "gradient_accumulation_steps": 8},
    "2x4": {"micro_batch": 2, "gradient_accumulation_steps": 4},
}
SPLIT_STRATEGIES = ("ddp", "zero1", "zero3")
SAVED = tuple(STRATEGIES)
"""Those whose checkpoints are loaded: by themselves, and by one process, whose own they load then."""
NUMERICS: dict[str, dict[str, Any]] = {
    "zero3_recomputed": {"parallel": ZERO3, "activation": {"kind": "full"}},
    "zero3_every_k": {"parallel": ZERO3, "activation": {"kind": "every_k"}},
    "ddp_offload": {"parallel": STRATEGIES["ddp"], "activation": {"kind": "offload"}},
    "zero3_offload_activations": {"parallel": ZERO3, "activation": {"kind": "offload"}, "attention": {"kind": "flash"}},
    "ddp_flash": {"parallel": STRATEGIES["ddp"], "attention": {"kind": "flash"}},
    "zero3_eager": {"parallel": ZERO3, "attention": {"kind": "eager"}},
    "ddp_compiled": {"parallel": STRATEGIES["ddp"], "compile": {"kind": "true"}},
    "zero2_compiled": {
        "parallel": STRATEGIES["zero2"],
        "compile": {"kind": "true"},
        "activation": {"kind": "every_k"},
        "attention": {"kind": "flash"},
    },
}
"""Ways to compute the same numbers."""

GROUPS = ("job", "model", "activation", "attention", "compile")


def case(name: str, parallel: dict[str, Any], **rest: Any) -> dict[str, Any]:
    groups = {group: rest.pop(group) for group in GROUPS if group in rest}
    return {"name": name, "world": 2, "steps": STEPS, "run": {"parallel": parallel, **groups}, **rest}


@pytest.fixture(scope="module")
def answers(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run all cases of this module on one pair of processes."""
    folder: Path = tmp_path_factory.mktemp("parity")
    saved = {name: str(folder / f"saved_{name}") for name in ("single", *SAVED)}
    single = {"parallel": {"kind": "single"}, "job": {"micro_batch": 16}}
    cases = [case("single", **single, generate=True, save=saved["single"]) | {"world": 1}]
    cases.append(case("learning", **single) | {"world": 1, "steps": 10})
    for name, parallel in STRATEGIES.items():
        cases.append(case(name, parallel, generate=True, save=saved[name]))
    resumed = ((name, [saved[name], saved["single"]]) for name in SAVED)
    cases += [case(f"{name}_resumed", STRATEGIES[name], load=load) | {"steps": 0} for name, load in resumed]
    cases.append(case("reader", **single, load=[saved[name] for name in SAVED]) | {"world": 1, "steps": 0})
    cases += [
        case(f"{name}_{split}", STRATEGIES[name], job=job) for name in SPLIT_STRATEGIES for split, job in SPLITS.items()
    ]
    cases += [case(name, **groups, generate="compile" in groups) for name, groups in NUMERICS.items()]
    cases.append(case("zero3_random", ZERO3, model={"weights": "random"}))
    # Adam undoes a factor that stays the same, so plant none at all: gradients that are clipped at each step
    # differ from those that never are
    cases.append(case("planted", STRATEGIES["zero2"], job={"clip_norm": 0.0}))
    cases.append(case("unclipped", {"kind": "single"}, job={"clip_norm": 0.0, "micro_batch": 16}) | {"world": 1})
    return run_cases(cases, folder)


def same(answer: Any, reference: Any) -> bool:
    return losses(answer) == pytest.approx(losses(reference), rel=1e-5)


def test_one_process_learns(answers: dict[str, Any]) -> None:
    single, longer = losses(answers["single"]), losses(answers["learning"])
    assert single == longer[:STEPS]
    assert longer[-1] < 0.8 * longer[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_equals_one_process(answers: dict[str, Any], name: str) -> None:
    single = answers["single"]
    assert same(answers[name], single)
    for ours, expected in zip(answers[name]["steps"], single["steps"], strict=True):
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert ours["tokens"] == expected["tokens"]
        assert not ours["skipped"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", SPLIT_STRATEGIES)
def test_accumulation_changes_nothing(answers: dict[str, Any], name: str, split: str) -> None:
    assert same(answers[f"{name}_{split}"], answers["single"])


@pytest.mark.parametrize("name", NUMERICS)
def test_recomputation_kernels_and_compilation_change_nothing(answers: dict[str, Any], name: str) -> None:
    assert same(answers[name], answers["single"])
    if "compile" in NUMERICS[name]:
        assert answers[name]["generated"] == answers["single"]["generated"]


def test_random_weights_under_zero3_know_nothing_yet(answers: dict[str, Any]) -> None:
    loss, tokens = answers["zero3_random"]["held_out"]
    assert loss / tokens == pytest.approx(math.log(256), rel=0.05)
    assert losses(answers["zero3_random"])[-1] < losses(answers["zero3_random"])[0]


def test_a_planted_difference_in_clipping_is_seen(answers: dict[str, Any]) -> None:
    assert losses(answers["planted"])[0] == pytest.approx(losses(answers["single"])[0], rel=1e-5)
    assert not same(answers["planted"], answers["single"])
    assert same(answers["planted"], answers["unclipped"])


@pytest.mark.parametrize("name", STRATEGIES)
def test_generation_equals_one_process(answers: dict[str, Any], name: str) -> None:
    assert answers[name]["generated"] == answers["single"]["generated"]
    assert len(answers[name]["generated"][0]) == 4 + 5


@pytest.mark.parametrize("name", SAVED)
def test_a_loaded_checkpoint_continues_to_the_bit(answers: dict[str, Any], name: str) -> None:
    assert answers[name]["after"]
    assert answers[f"{name}_resumed"]["after"] == answers[name]["after"]


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_one_process_continues_under_a_strategy_and_back(answers: dict[str, Any], name: str) -> None:
    single = answers["single"]
    assert losses(answers[f"{name}_resumed"], "after1") == pytest.approx(losses(single, "after"), rel=1e-6)
    read = losses(answers["reader"], f"after{SAVED.index(name) or ''}")
    assert read == pytest.approx(losses(answers[name], "after"), rel=1e-6)
