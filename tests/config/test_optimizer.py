"""Optimizers as options: what they refuse, and the memory that they are expected to take."""

from __future__ import annotations

import re
from typing import Any

import pytest

from launcher.config.compose import compose
from launcher.config.model.shape import Gpt2Sizes
from launcher.config.optimizer import Adafactor, AdamW, AdamW8bit, Muon, Optimizer, ParameterGroup, Sgd
from launcher.config.validate import validate_run
from launcher.errors import ConfigErrors
from launcher.planning.planner import estimate_memory
from launcher.protocol.plan import Host

SHAPE = Gpt2Sizes(
    num_hidden_layers=2, num_attention_heads=2, hidden_size=128, max_position_embeddings=64, vocab_size=512
).shape()


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (AdamW(), 2.0),
        (Sgd(), 1.0),
        (Sgd(momentum=0), 0.0),
        (AdamW8bit(), 0.5078125),
        (Muon(), 2 - 2 * SHAPE.block_params / SHAPE.num_params),
        (Adafactor(), 2 / 128),
    ],
)
def test_the_estimate_counts_the_state_of_each_optimizer(optimizer: Optimizer, moments: float) -> None:
    assert optimizer.moments(SHAPE) == pytest.approx(moments)


def test_the_plan_estimates_by_the_chosen_optimizer() -> None:
    host = Host(name="here", slots=1)
    sizes = {}
    for kind in ("adamw", "adamw_8bit", "sgd", "muon", "adafactor"):
        run = compose((f"optimizer={kind}", "parallel=single", "backend.ranks=1")).run
        memory = estimate_memory(run, [host])
        assert memory is not None
        sizes[kind] = memory.per_rank.optimizer / memory.num_params
    assert sizes["adamw"] == 8
    assert sizes["adamw_8bit"] == pytest.approx(2, rel=0.02)
    assert sizes["sgd"] == 4
    assert 4 < sizes["muon"] < 8
    assert sizes["adafactor"] < 0.1


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (AdamW, {"lr": -1.0}, "set optimizer.lr=1e-3"),
        (Sgd, {"momentum": 1.0}, "optimizer.momentum=1.0"),
        (Sgd, {"momentum": 0, "nesterov": True}, "optimizer.nesterov"),
        (Muon, {"ns_steps": 0}, "optimizer.ns_steps"),
        (Muon, {"ns_steps": 100}, "optimizer.ns_steps"),
        (Adafactor, {"beta2_decay": 0.5}, "optimizer.beta2_decay"),
        (Adafactor, {"clip_threshold": 0.5}, "optimizer.clip_threshold"),
        (AdamW, {"groups": (ParameterGroup(pattern="*"),)}, "it changes nothing"),
        (AdamW, {"groups": (ParameterGroup(pattern="*", lr_scale=-1),)}, "must be at least 0"),
        (
            AdamW,
            {"groups": (ParameterGroup(pattern="*", lr_scale=2), ParameterGroup(pattern="a", lr_scale=3))},
            "first",
        ),
    ],
)
def test_values_that_are_refused(kind: type[Optimizer], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigErrors, match=re.escape(message)):
        kind(**values)


def test_the_first_matching_group_counts() -> None:
    groups = (ParameterGroup(pattern="*.bias", lr_scale=2), ParameterGroup(pattern="h.*", weight_decay=0.5))
    optimizer = AdamW(groups=groups)
    assert [optimizer.group_of(name) for name in ("h.0.bias", "h.0.weight", "wte.weight")] == [0, 1, None]


@pytest.mark.parametrize(
    ("words", "ranks", "why"),
    [
        (("optimizer=muon", "parallel=zero2"), 2, "needs whole matrices"),
        (("optimizer=adafactor", "parallel=zero3"), 2, "have no rows and columns"),
        (("optimizer=adamw_8bit", "parallel=zero1"), 2, "would mix parameters"),
        (("optimizer=adamw_8bit", "parallel=fsdp"), 2, "would begin elsewhere"),
        (("optimizer=sgd", "parallel=deepspeed_pipeline"), 2, "supports AdamW only"),
        (("optimizer=adamw_8bit", "parallel=fsdp"), 1, None),
        (("optimizer=adamw_8bit", "parallel=pipeline"), 2, None),
        (("optimizer=adamw_8bit", "parallel=pipeline", "parallel.data=shard"), 4, "would begin elsewhere"),
        (("optimizer=muon", "parallel=fsdp"), 2, None),
        (("optimizer=muon", "parallel=pipeline"), 2, None),
    ],
)
def test_strategies_that_an_optimizer_cannot_have(words: tuple[str, ...], ranks: int, why: str | None) -> None:
    run = compose((*words, f"backend.ranks={ranks}")).run
    errors = [str(error) for error in validate_run(run, [Host(name="here", slots=ranks)])]
    own = [error for error in errors if error.startswith("optimizer=")]
    assert [why in error for error in own if why] == ([True] if why else []), errors
    assert bool(own) == bool(why)


def test_groups_can_be_written_on_a_command_line() -> None:
    words = ("optimizer.groups=[{pattern:'*.bias',lr_scale:0.1},{pattern:'*wte*',weight_decay:0.0}]",)
    run = compose(words).run
    assert run.optimizer.groups == (
        ParameterGroup(pattern="*.bias", lr_scale=0.1),
        ParameterGroup(pattern="*wte*", weight_decay=0.0),
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("[{pattern:'*.biass',lr_scale:2}]",), "[0]=*.biass: it matches no parameter that is trained"),
        (("[{pattern:'*.bias',lr_scale:2}]",), None),
        (("[{pattern:'*.ln_1.*',lr_scale:2},{pattern:'*.ln_1.bias',lr_scale:3}]",), "[1]=*.ln_1.bias: earlier groups"),
        (("[{pattern:'*.bias',lr_scale:2}]", "adapter=lora"), "such as transformer.h.0.attn.c_attn.lora_A"),
        (("[{pattern:'*.lora_B.*',lr_scale:16}]", "adapter=lora"), None),
        (("[{pattern:'*.bias',lr_scale:2}]", "adapter=lora", "adapter.bias=all"), None),
        (("[{pattern:'*.bias',lr_scale:2}]", "model=llama_tiny"), "it matches no parameter"),
    ],
)
def test_a_group_without_parameters_is_refused_in_the_plan(words: tuple[str, ...], said: str | None) -> None:
    groups, *others = words
    run = compose(("model=gpt2_tiny", f"optimizer.groups={groups}", *others)).run
    errors = [str(error) for error in validate_run(run, [Host(name="here", slots=1)])]
    own = [error for error in errors if error.startswith("optimizer.groups")]
    assert [said in error for error in own if said] == ([True] if said else []), errors
    assert bool(own) == bool(said)


def test_an_unknown_optimizer_may_be_one_of_a_plugin() -> None:
    with pytest.raises(ConfigErrors, match=r"choose from: adafactor, .*plugins=\[MODULE\]"):
        compose(("optimizer=lion",))
