"""Formats, kernels and compilation: what is refused before anything starts, and what the plan says besides."""

from dataclasses import replace

import pytest

from launcher.errors import ConfigErrors
from tests.conftest import BOX

GPUS = replace(BOX, name="big", devices=("NVIDIA H100",) * 2, device_ids=("0", "1"))
UNKNOWN = replace(BOX, name="far", is_probed=False)
LLAMA = ("model=smollm2_135m", "model.weights=random", "data.vocab_size=4096")


@pytest.mark.parametrize(
    ("words", "host", "said"),
    [
        (("precision=tf32",), BOX, "precision=tf32: only GPUs .* and box has none; set precision=fp32"),
        ((*LLAMA, "precision=fp8"), BOX, "precision=fp8: only GPUs .* and box has none; set precision=bf16"),
        (("precision=fp8",), GPUS, "precision=fp8: GPT-2's layers are Conv1D"),
        ((*LLAMA, "precision=fp8", "parallel=zero1"), GPUS, "precision=fp8: DeepSpeed .*parallel=ddp"),
        (
            (*LLAMA, "precision=fp8", "job.micro_batch=3", "job.sequence_length=20"),
            GPUS,
            "3 × 20 = 60 tokens is not a multiple of 16.*set job.sequence_length=16",
        ),
        ((*LLAMA, "attention=flex"), BOX, "attention=flex: it has no backward pass on a CPU.*; set attention=sdpa"),
        (("attention=flex",), GPUS, "attention=flex: Transformers has no flex attention for GPT-2"),
        (("attention=flash",), GPUS, "attention=flash: on a GPU .*16-bit.* precision is fp32; set precision=bf16"),
        (("attention=flash", "precision=tf32"), GPUS, "precision is tf32"),
        (("attention=flash", "model.dropout=0.1"), BOX, r"no dropout, and model\.dropout=0\.1; set model\.dropout=0"),
        (("compile=true", "activation=offload"), BOX, "compile=true: .*; set activation=full or compile=false"),
        (("compile=true", "parallel=zero3"), BOX, "compile=true: ZeRO-3 .*; set parallel=zero2 or compile=false"),
        (("optimizer.implementation=native",), BOX, "optimizer.implementation=native: .*DeepSpeed.*=torch"),
    ],
)
def test_refused_in_one_line(plan_of, words, host, said):
    with pytest.raises(ConfigErrors, match=said) as caught:
        plan_of(*words, hosts=[host])
    assert len(caught.value.errors) == 1, str(caught.value)


@pytest.mark.parametrize(
    ("words", "host"),
    [
        (("precision=tf32",), GPUS),
        (("precision=tf32",), UNKNOWN),
        ((*LLAMA, "precision=fp8"), GPUS),
        ((*LLAMA, "precision=fp8", "compile=true"), UNKNOWN),
        ((*LLAMA, "attention=flex"), GPUS),
        ((*LLAMA, "attention=flex"), UNKNOWN),
        (("attention=flash", "precision=bf16"), GPUS),
        (("attention=flash",), BOX),
        (("attention=flash", "model.dropout=0.1", "precision=bf16"), GPUS),
        (("compile=true", "parallel=zero2", "activation=every_k"), BOX),
        (("optimizer.implementation=native", "parallel=zero2"), BOX),
        (("optimizer.implementation=torch",), BOX),
    ],
)
def test_planned(plan_of, words, host):
    assert plan_of(*words, hosts=[host])


def test_the_plan_says_that_offload_moves_nothing_without_a_gpu(plan_of):
    (note,) = plan_of("activation=offload").warnings
    assert note.startswith("activation=offload moves nothing")
    assert not plan_of("activation=offload", hosts=[GPUS]).warnings


def test_the_plan_names_all_of_it(plan_of):
    what = plan_of("activation=every_k", "attention=flash", "compile=true").summary
    assert (what.activation, what.attention, what.compile) == ("every_k k=2", "flash", "true")


def test_tf32_is_stored_and_sent_as_fp32(plan_of):
    tf32, fp32 = (plan_of("parallel=zero2", f"precision={name}", hosts=[GPUS]) for name in ("tf32", "fp32"))
    assert tf32.engine_config == fp32.engine_config
    assert tf32.memory == fp32.memory
