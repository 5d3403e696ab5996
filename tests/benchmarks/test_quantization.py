"""Decoding in several ways, each in a process of its own: the same tokens where numbers are the same, honest bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.benchmarks.isolated import run_isolated
from launcher.config.compose import compose
from launcher.errors import ConfigErrors, JobError
from launcher.execution.prepare import prepare
from launcher.utils.files import read_json
from tests.conftest import RunProgram

CASES = ("fp32/eager", "fp32/engine", "int4_weight/eager", "int4_weight/engine")
WORDS = ("job=benchmark", "benchmark=quantization", "model=llama_tiny", "parallel=single", "tracker=local")


def test_ways_are_timed_and_the_engine_chooses_the_tokens_of_plain_passes(launch, tmp_path: Path) -> None:
    quick = ("benchmark.input_len=8", "benchmark.output_len=6", "benchmark.repeats=1", "benchmark.warmup=0")
    made = launch(*WORDS, *quick, f"benchmark.cases=[{','.join(CASES)}]", "run.dir=made").expect(0)
    found = read_json(tmp_path / "made" / "benchmark.json")
    tokens = {way: found["facts"][way]["tokens"] for way in CASES}
    assert tokens["fp32/eager"] == tokens["fp32/engine"]
    assert tokens["int4_weight/eager"] == tokens["int4_weight/engine"]
    read = {way: found["cases"][way]["read_bytes"][0] for way in CASES}
    matrices, head, norms = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 352), 2048 * 128, (2 * 4 + 1) * 128
    assert read["fp32/eager"] == pytest.approx(4 * (matrices + head + norms), rel=1e-4)
    assert read["fp32/eager"] - read["int4_weight/engine"] == pytest.approx(matrices * (4 - 4.75 / 8), rel=1e-3)
    assert found["metrics"]["fp32/eager/speedup"] == 1.0
    seconds = {way: found["cases"][way]["token_s"][0] for way in CASES}
    assert found["metrics"]["fp32/engine/speedup"] == pytest.approx(seconds["fp32/eager"] / seconds["fp32/engine"])
    assert 0 < found["metrics"]["int4_weight/engine/roofline_share"] < 2
    assert "memory is read at" in made.output
    assert "best: " in made.output


@pytest.mark.parametrize(("family", "weights"), [("llama", "fp32"), ("llama", "int8_weight"), ("gpt2", "fp32")])
def test_blocks_share_one_compilation_and_choose_the_tokens_of_plain_passes(
    family: str, weights: str, run_forked_program: RunProgram
) -> None:
    printed = run_forked_program(Path(__file__).with_name("decode_blocks.py"), family, weights)
    found = json.loads(printed.splitlines()[-1])
    assert found["blocks"] == found["eager"]
    assert len(set(found["eager"][0])) > 4, "a model that repeats itself would not show a mistake"
    assert found["graphs"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("benchmark.cases=[int8_weights/eager]",),
            "int8_weights/eager is not of the form WEIGHTS/HOW; did you mean int8_weight/eager",
        ),
        (("benchmark.cases=[]",), "is empty or has duplicates"),
        (("benchmark.ctranslate2=folder",), "benchmark.ctranslate2_python"),
    ],
)
def test_what_cannot_be_measured_is_refused(plan_of, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigErrors) as refused:
        plan_of(*WORDS, *words)
    assert said in str(refused.value)


SHORT = ("model=gpt2_tiny", "model.max_position_embeddings=64", "backend.ranks=1")


@pytest.mark.parametrize(
    ("words", "option", "fix"),
    [
        (("job=quantize", "quantization=int8_weight"), "job.rate_prompt=128", "job.rate_prompt=32"),
        (
            ("job=quantize", "quantization=int8_weight", "job.rate_tokens=70"),
            "job.rate_prompt=128",
            "job.rate_tokens=32",
        ),
        (("job=quantize", "quantization=int8_weight", "job.sample_tokens=64"), "job.sample_tokens=64", "=63"),
        (("benchmark=quantization",), "benchmark.input_len=64", "benchmark.input_len=31"),
        (("benchmark=batching", "benchmark.output_len=64"), "benchmark.output_len=64", "benchmark.output_len=63"),
        (("benchmark=batching", "benchmark.input_len=16-50"), "benchmark.input_len=50", "benchmark.input_len=32"),
        (("benchmark=serving",), "benchmark.input_len=256", "benchmark.input_len=32 benchmark.output_len=32"),
        (
            ("benchmark=serving", "benchmark.input_len=lognormal:9:1:60"),
            "benchmark.input_len=60",
            "benchmark.input_len=32",
        ),
        (("benchmark=cache",), "benchmark.max_length=100", "benchmark.max_length=64"),
        (("benchmark=cache", "benchmark.warm_up=[[1,65]]"), "benchmark.warm_up[0]=65", "[[1,64]]"),
        (("job=serve", "job.warm_up=[[1,65]]"), "job.warm_up[0]=65", "[[1,64]]"),
        (("job=train", "job.sequence_length=65"), "job.sequence_length=65", "job.sequence_length=64"),
    ],
)
def test_lengths_beyond_the_models_longest_are_refused_in_the_plan(words, option: str, fix: str) -> None:
    job = () if words[0].startswith("job=") else ("job=benchmark",)
    with pytest.raises(ConfigErrors) as errors:
        prepare(compose([*job, *SHORT, *words]))
    found = [line for line in str(errors.value).splitlines() if line.startswith(option)]
    assert found, errors.value
    assert "takes at most 64 tokens" in found[0]
    assert fix in found[0].rpartition("; ")[2]


def test_what_failed_in_a_process_of_its_own_is_named() -> None:
    with pytest.raises(JobError, match=r"^json:loads failed: TypeError: .*'progress'; the log"):
        run_isolated("json:loads", {"s": "1"}, heartbeat=lambda: None)
