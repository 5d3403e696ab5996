"""The group adapter in the plan: what is trained, its memory, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.config.adapter import Lora, shortest_targets
from launcher.config.compose import compose
from launcher.config.model.linear_layers import module_sizes
from launcher.config.validate import validate_run
from launcher.errors import ConfigErrors
from launcher.planning.planner import estimate_memory
from launcher.protocol.plan import Host

ONE = ("parallel=single", "data=synthetic", "model=llama_tiny")


def hosts(slots: int) -> list[Host]:
    return [Host(name="here", address="127.0.0.1", slots=slots, python="python", cores=4, memory_bytes=2**34)]


def refusals(*words: str, slots: int = 1) -> str:
    try:
        run = compose((*ONE, *words)).run
    except ConfigErrors as errors:
        return str(errors)
    return "\n".join(map(str, validate_run(run, hosts(slots))))


def test_it_is_accepted_with_every_kind() -> None:
    for kind in ("lora", "rslora", "dora", "qlora"):
        assert refusals(f"adapter={kind}") == ""


def test_the_plan_says_how_many_parameters_are_trained_and_of_which_layers() -> None:
    run = compose((*ONE, "adapter=lora", "adapter.r=4", "adapter.targets=[q_proj,model.layers.0.mlp.*]")).run
    assert run.lora is not None
    modules, shape = module_sizes(run.model), run.model.shape()
    assert modules is not None
    assert shape is not None
    said = run.lora.describe(modules, num_params=shape.num_params)
    targets = run.lora.target_names(modules.linear)
    assert len(targets) == 4 + 3
    trained = sum(4 * (modules.linear[name].inputs + modules.linear[name].outputs) for name in targets)
    assert said.startswith(f"{trained:,} of {shape.num_params + trained:,} parameters are trained")
    assert said.endswith("lora r=4 on 7 layers (q_proj, gate_proj, up_proj, down_proj)")


def test_gradients_and_moments_are_those_of_the_adapter_alone() -> None:
    adapted, whole = (
        estimate_memory(compose((*ONE, *words)).run, hosts(1)) for words in (("adapter=lora",), ("adapter=none",))
    )
    run = compose((*ONE, "adapter=lora")).run
    modules = module_sizes(run.model)
    assert adapted is not None
    assert whole is not None
    assert run.lora is not None
    assert modules is not None
    trained = run.lora.num_trained(modules)
    assert adapted.per_rank.gradients == 4 * trained
    assert adapted.per_rank.optimizer == 8 * trained
    assert adapted.per_rank.parameters == whole.per_rank.parameters + 4 * trained
    packed = estimate_memory(compose((*ONE, "adapter=qlora")).run, hosts(1))
    assert packed is not None
    linear = sum(size.inputs * size.outputs for size in modules.linear.values())
    assert packed.per_rank.parameters == pytest.approx(adapted.per_rank.parameters - linear * (4 - 0.5625), abs=2)


def test_qlora_means_nf4_unless_another_method_is_chosen() -> None:
    assert compose((*ONE, "adapter=qlora")).run.model.quantization == "nf4"
    assert compose((*ONE, "adapter=qlora", "model.quantization=int8_weight")).run.model.quantization == "int8_weight"
    assert compose((*ONE, "adapter=lora")).run.model.quantization == "none"


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a pattern that matches nothing": (
        ("adapter=lora", "adapter.targets=[q_porj]"),
        "adapter.targets=[q_porj]: 'q_porj' matches no linear layer in the blocks: there are q_proj, k_proj, v_proj, "
        "o_proj, gate_proj, up_proj, down_proj; did you mean q_proj",
    ),
    "no such module": (("adapter=lora", "adapter.modules_to_save=[lm_haed]"), "did you mean lm_head?"),
    "trained in two ways": (
        ("adapter=lora", "adapter.modules_to_save=[q_proj]"),
        "model.layers.0.self_attn.q_proj is one of adapter.targets, and would be trained in two ways",
    ),
    "one of two tied weights": (
        ("adapter=lora", "model.tie_word_embeddings=true", "adapter.modules_to_save=[lm_head]"),
        "lm_head shares its weight with model.embed_tokens, and a trained copy would separate them",
    ),
    "rank": (("adapter=lora", "adapter.r=0"), "adapter.r=0 (command line): must be at least 1; set adapter.r=1"),
    "fp8": (("adapter=lora", "precision=fp8"), "precision=fp8: the matrices of an adapter are too narrow for fp8"),
    "rounded inputs": (
        ("adapter=lora", "model.quantization=int8_dynamic"),
        "model.quantization=int8_dynamic: it rounds the inputs of layers, so no gradient passes through them",
    ),
    "dora on quantized weights": (
        ("adapter=dora", "model.quantization=nf4"),
        "adapter=dora: DoRA divides by the lengths of the weights at every step, and quantized weights have none",
    ),
    "whole weights that are quantized": (
        ("model.quantization=nf4",),
        "or adapter=qlora to train an adapter on them",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(name: str) -> None:
    words, said = REFUSED[name]
    assert said in refusals(*words)


SPREAD: dict[str, tuple[tuple[str, ...], str]] = {
    "tensor": (("parallel=tensor",), "tensor parallelism slices the layers that the adapter wraps"),
    "a stage without any": (
        ("parallel=pipeline", "parallel.stages=2", "adapter.targets=[model.layers.0.*]"),
        "parallel=pipeline trains on every stage, and model.layers.1 has none of these layers",
    ),
    "shards of quantized weights": (
        ("parallel=fsdp", "model.quantization=nf4"),
        "parallel=fsdp splits matrices, and quantized ones cannot be split",
    ),
}


@pytest.mark.parametrize("name", SPREAD)
def test_strategies_that_cannot_train_it_are_refused(name: str) -> None:
    words, said = SPREAD[name]
    assert said in refusals("adapter=lora", *words, slots=2)


def test_targets_are_written_as_short_as_they_mean_the_same() -> None:
    names = [f"layers.{number}.{end}" for number in range(2) for end in ("q", "k")]
    assert shortest_targets(["layers.0.q", "layers.1.q"], names) == ("q",)
    assert shortest_targets(["layers.0.q"], names) == ("layers.0.q",)


@pytest.mark.parametrize("kind", ["gpt2_tiny", "llama_tiny", "smollm2_135m"])
def test_every_linear_layer_of_a_family_is_a_target(kind: str) -> None:
    run: Any = compose(("parallel=single", "data=synthetic", f"model={kind}", "adapter=lora")).run
    modules = module_sizes(run.model)
    assert modules is not None
    assert Lora().target_names(modules.linear) == list(modules.linear)
