"""Row 5 of the article: bytes of model state on real ranks beside the formula that plans print."""

from __future__ import annotations

import json

import pytest

from launcher.errors import ConfigErrors
from launcher.planning.render import render_plan
from launcher.protocol.plan import Host

TINY = (
    *("job=benchmark", "benchmark=memory", "tracker=local", "backend.ranks=2", "backend.threads=1"),
    *(
        "model.num_hidden_layers=2",
        "model.hidden_size=64",
        "model.num_attention_heads=2",
        "model.max_position_embeddings=32",
        "model.vocab_size=256",
    ),
    *("benchmark.batch_size=2", "benchmark.sequence_length=16"),
)
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp")
NUM_PARAMS = (256 + 32) * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64


def test_ranks_hold_what_the_formula_says(launch) -> None:
    ended = launch(*TINY, f"benchmark.strategies=[{','.join(STRATEGIES)}]").expect(0)
    found = json.loads((ended.run_dir / "benchmark.json").read_text())
    assert list(found["cases"]) == list(STRATEGIES)
    for name, facts in found["facts"].items():
        assert len(facts["ranks"]) == (1 if name == "single" else 2)
        for rank in facts["ranks"]:
            assert rank["num_params"] == NUM_PARAMS
            for part, expected in facts["formula_bytes"].items():
                held = rank[f"{part}_bytes"]
                if part == "gradients" and name in ("zero1", "zero2"):
                    expected = NUM_PARAMS * 2  # ZeRO-1 has freed the other rank's before the update, too
                    assert expected <= held < 1.2 * expected, (
                        "one parameter belongs to both ranks, and is whole on each"
                    )
                else:
                    assert held == pytest.approx(expected, rel=0.02), (name, part)
            assert rank["peak_bytes"] > sum(rank[f"{part}_bytes"] for part in facts["formula_bytes"])
    held = {name: facts["ranks"][0]["optimizer_bytes"] for name, facts in found["facts"].items()}
    assert held["single"] == held["ddp"] == 8 * NUM_PARAMS + 4 * 28  # a step counter for each parameter
    page = (ended.run_dir / "benchmark.md").read_text()
    for line in (f"- parameters: {NUM_PARAMS:,}", "- optimizer state memory (zero3): ", "| fsdp | 1 | "):
        assert line in page
    assert "- zero1: gradients are 0.5" in page
    assert (ended.run_dir / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((ended.run_dir / "result.json").read_text())["metrics"]
    assert metrics["benchmark/ddp/optimizer_bytes"] == held["ddp"]
    assert metrics["benchmark/zero3/optimizer_ratio"] == pytest.approx(1, rel=0.02)
    assert not (ended.run_dir / "cases").exists(), "files that ranks exchanged are left behind"


def test_a_strategy_that_is_late_ends_the_run_and_is_named(launch) -> None:
    ended = launch(*TINY, "benchmark.strategies=[ddp]", "benchmark.case_timeout_s=1", "benchmark.warmup=100000").expect(
        1
    )
    failure = json.loads((ended.run_dir / "failure.json").read_text())
    assert "ddp failed on rank" in failure["error"]
    assert "was not done after 1 s" in failure["error"]


def test_a_storage_counts_once_and_with_the_first_part_that_it_belongs_to() -> None:
    import torch

    from launcher.engines.model_state import state_bytes

    flat = torch.zeros(100)
    weight, twin, gradient = flat[:40], flat[40:], torch.zeros(30, dtype=torch.bfloat16)
    held = state_bytes(
        parameters=[weight, twin, torch.empty(0)],
        gradients=[gradient, None],
        optimizer=[flat, torch.zeros(5)],
        device=torch.device("cpu"),
    )
    assert (held.parameters, held.gradients, held.optimizer, held.host) == (400, 60, 20, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("benchmark.strategies=[zreo3]",), "there is no strategy zreo3 to measure; did you mean zero3"),
        (("benchmark.strategies=[deepspeed_pipeline2]",), "there is no strategy deepspeed_pipeline2 to measure"),
        (("benchmark.strategies=[]",), "is empty or has duplicates"),
        (("benchmark.strategies=[hsdp]",), "hsdp: needs 4 ranks"),
        (("benchmark.batch_size=3",), r"ddp: .* does not divide 3"),
        (("benchmark.warmup=0",), "must be at least 1"),
        (("benchmark.sequence_length=33",), "takes at most 32 tokens; set benchmark.sequence_length=32"),
    ],
)
def test_what_cannot_be_measured_is_refused(plan_of, words, message) -> None:
    with pytest.raises(ConfigErrors, match=message):
        plan_of(*TINY, *words)


def test_the_plan_counts_the_parameters(plan_of) -> None:
    text = render_plan(plan_of("+exp=memory_gpt2", hosts=[Host(name="box", slots=2, cores=4)]))
    assert "gpt2, 124,439,808 parameters, precision=fp32" in text
    assert "single, ddp, zero1, zero2, zero3, zero3_offload, fsdp" in text
