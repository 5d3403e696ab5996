"""The group ``sparsity``: shares, patterns and their contradictions, and what other jobs make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.config.compose import compose
from launcher.config.sparsity import Magnitude, SparseGpt, Wanda, num_zeros, parse_pattern
from launcher.errors import ConfigErrors
from tests.conftest import BOX

WORDS = ("job=sparsify", "model=gpt2_tiny", "parallel=single", "backend.ranks=1", "tracker=local")


def test_a_pattern_sets_the_share_of_zeros() -> None:
    assert Magnitude().zero_share == 0.5
    assert Magnitude(ratio=0.3).zero_share == 0.3
    assert Wanda(pattern="1:4").zero_share == 0.75
    assert SparseGpt(pattern="2:8", ratio=0.75).zero_share == 0.75
    assert parse_pattern("4:8") is not None
    assert [parse_pattern(text) for text in ("0:4", "4:4", "2", "2:", "a:b", "-1:4", "unstructured")] == [None] * 7
    assert [num_zeros(100, share) for share in (0.29, 0.5, 0.999)] == [29, 50, 99]


def test_the_plan_says_what_is_pruned(plan_of) -> None:  # type: ignore[no-untyped-def]
    words = ("sparsity=sparsegpt", "sparsity.pattern=2:4", "sparsity.calibration_sequences=16")
    plan = plan_of(*WORDS, *words, hosts=[replace(BOX, slots=1)])
    assert plan.details["zeros"] == "50.0% of each matrix in the blocks, 2:4"
    assert plan.details["calibrated on"] == "16 training sequences of 128 tokens"
    words = ("sparsity.allocation=owl", "sparsity.ratio=0.6", "sparsity.owl_lambda=0.1")
    assert plan_of(*WORDS, "sparsity=wanda", *words, hosts=[replace(BOX, slots=1)]).details["allocation"] == (
        "OWL: 40.0% to 80.0% of a block, 60.0% on average"
    )


def test_yaml_reads_a_pattern_as_text() -> None:
    assert compose([*WORDS, "sparsity=wanda", "sparsity.pattern=2:4"]).run.sparsity.groups is not None
    assert compose(["+exp=sparsify_tiny"]).run.sparsity.groups is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("job=sparsify",), "job=sparsify needs a method of pruning; set sparsity=wanda, sparsegpt or magnitude"),
        (("job=train", "sparsity=wanda"), "sparsity=wanda: job=train does not prune a model; set job=sparsify"),
        (("job=sparsify", "sparsity=wanda", "sparsity.keep=true"), "job=sparsify trains no weights"),
        (("job=evaluate", "sparsity.keep=true"), "job=evaluate trains no weights, so their zeros stay"),
        (("job=train", "sparsity.keep=true"), "random weights have no zeros to keep; set model.weights to a folder"),
        (("job=train", "sparsity.keep=true", "adapter=lora"), "merged into them its update would fill the zeros"),
        (("job=train", "sparsity.keep=true", "optimizer.eps=0"), "the update of a weight without a gradient is 0 / 0"),
        (("sparsity.ratio=1",), "leaves every matrix empty"),
        (("sparsity.ratio=0",), "sets no weight to zero; it must be more than 0"),
        (("sparsity.ratio=0.7", "sparsity.pattern=2:4"), "the pattern 2:4 sets 1 - 2/4 = 0.5 to zero"),
        (("sparsity.pattern=4:4",), "nor N:M with N of at least 1 and less than M"),
        (("sparsity.pattern=124",), "YAML reads 2:4 without quotes as 2 * 60 + 4"),
        (("sparsity.pattern=2:12",), "transformer.h.0.attn.c_attn has 128 inputs, which groups of 12 do not divide"),
        (("sparsity.pattern=2:12",), "'sparsity.skip=[\"*.attn.c_attn\"]'"),
        (("sparsity.ratio=0.001",), "0.001 of 128 weights, rounded down, sets no weight to zero in transformer.h.0"),
        (("sparsity=magnitude", "sparsity.ratio=0.999999999999"), "leaves nothing of transformer.h.0.attn.c_attn"),
        (("sparsity.skip=[nothing]",), "'nothing' matches no linear layer of gpt2_tiny"),
        (("sparsity.skip=['*']",), "the patterns match every layer"),
        (("sparsity.skip=['']",), "an empty pattern matches no layer"),
        (("sparsity=magnitude", "sparsity.calibration_sequences=8"), "sparsity=wanda and sparsity=sparsegpt have it"),
        (("sparsity=magnitude", "sparsity.allocation=owl"), "sparsity=wanda and sparsity=sparsegpt have it"),
        (("sparsity.damping=0.1",), "sparsegpt has it"),
        (("sparsity=sparsegpt", "sparsity.damping=0"), "leave the Hessian without an inverse"),
        (("sparsity=sparsegpt", "sparsity.pattern=4:8", "sparsity.block_size=100"), "set sparsity.block_size=256"),
        (("sparsity=sparsegpt", "sparsity.block_size=0"), "must be at least 1"),
        (("sparsity.owl_m=3",), "has no effect on a uniform allocation; set sparsity.allocation=owl"),
        (("sparsity.allocation=owl", "sparsity.pattern=2:4"), "gives every block the same share of zeros"),
        (
            ("sparsity.allocation=owl", "sparsity.ratio=0.9"),
            "shares of zeros may reach 0.9 - 0.16 = 0.74 and 0.9 + 0.16 = 1.06, and must be between 0 and 1; "
            "set sparsity.owl_lambda=0.049",
        ),
        (("sparsity.allocation=owl", "sparsity.owl_lambda=-1"), "must be more than 0"),
        (("sparsity.calibration_sequences=0",), "must be at least 1"),
        (("model.quantization=int4_weight",), "and quantize what job=sparsify saves by job=quantize"),
        (("precision=fp16",), "layers are calibrated, and weights saved, in fp32 or bf16"),
        (("backend.ranks=2",), "one rank does all the work of job=sparsify"),
    ],
)
def test_what_has_no_effect_or_cannot_work_is_refused(plan_of, words, said: str) -> None:  # type: ignore[no-untyped-def]
    groups = {word.partition("=")[0] for word in words}
    chosen = [word for word in ("job=sparsify", "sparsity=wanda") if "job" not in groups and word[:8] not in groups]
    with pytest.raises(ConfigErrors) as refused:
        plan_of("model=gpt2_tiny", "parallel=single", "backend.ranks=1", *chosen, *words)
    assert said in str(refused.value)
