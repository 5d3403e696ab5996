"""Row 3 of the article: the idle share of pipelines on real ranks, and what stages bring against one."""

from __future__ import annotations

import json
import time

import pytest

from launcher.benchmarks.pipeline_bubble import bubble_fraction, longest_path, theory_of
from launcher.benchmarks.pipeline_stages import fold_ranks
from launcher.config.benchmark.distributed import PipelineCase
from launcher.errors import ConfigErrors, JobError
from launcher.planning.render import render_plan
from launcher.protocol.plan import Host

TINY = (
    *("job=benchmark", "benchmark=pipeline", "tracker=local", "backend.ranks=2", "backend.threads=1"),
    *(
        "model.num_hidden_layers=4",
        "model.hidden_size=32",
        "model.num_attention_heads=2",
        "model.max_position_embeddings=32",
        "model.vocab_size=64",
    ),
    *("benchmark.batch_size=4", "benchmark.sequence_length=16", "benchmark.micro_batches=[2]", "benchmark.repeats=1"),
)
UNIT_S = 0.03
CASES = [
    *("sleep_train_gpipe_2_stages_2", "sleep_train_zbv_2_stages_2", "sleep_infer_2_stages_2"),
    *("model_train_one_stage_2", "model_train_gpipe_2_stages_2", "model_train_zbv_2_stages_2"),
    *("model_infer_one_stage_2", "model_infer_2_stages_2"),
]


def test_every_pipeline_is_measured_beside_theory_and_one_stage(launch) -> None:
    words = ("benchmark.schedules=[gpipe,zbv]", f"benchmark.unit_ms={1000 * UNIT_S:g}")
    ended = launch(*TINY, *words).expect(0)
    found = json.loads((ended.run_dir / "benchmark.json").read_text())
    facts, cases = found["facts"], found["cases"]
    assert list(cases) == list(facts) == CASES
    for name, fact in facts.items():
        if "one_stage" in name:
            assert (fact["theory"], fact["idle"], fact["speedup"]) == (None, None, None)
            continue
        assert 0 < fact["idle"] < 1
        base = name.replace("gpipe_", "").replace("zbv_", "").replace("2_stages", "one_stage")
        if name.startswith("model"):
            assert fact["speedup"] == pytest.approx(fact["tokens_per_s"] / facts[base]["tokens_per_s"])
            assert fact["tokens_per_s"] == pytest.approx(4 * 16 / cases[name]["step_s"][0])
    assert facts["sleep_train_gpipe_2_stages_2"]["theory"] == facts["model_infer_2_stages_2"]["theory"] == 1 / 3
    # two micro-batches do not fill a V of two ranks: 14 units long, 12 of them work
    assert facts["sleep_train_zbv_2_stages_2"]["theory"] == pytest.approx(1 / 7)
    assert not facts["sleep_train_zbv_2_stages_2"]["formula_holds"]
    assert facts["sleep_train_gpipe_2_stages_2"]["live"] == [2, 2]
    # sleepers never wake early: three passes one after the other, forward alone or with both gradients
    assert cases["sleep_infer_2_stages_2"]["step_s"][0] >= 3 * UNIT_S
    assert cases["sleep_train_gpipe_2_stages_2"]["step_s"][0] >= 9 * UNIT_S
    # and what they sleep counts as work: two micro-batches on two ranks, one unit forward and two backward
    for name, units in (("sleep_train_gpipe_2_stages_2", 12), ("sleep_infer_2_stages_2", 4)):
        assert 2 * cases[name]["step_s"][0] * (1 - facts[name]["idle"]) >= units * UNIT_S
    page = (ended.run_dir / "benchmark.md").read_text()
    assert "| sleep | train | gpipe | 2 | 2 | 33.3% | " in page
    assert "| sleep | train | zbv | 2 | 2 | 14.3% * | " in page
    assert "times one stage; idle" in page
    metrics = json.loads((ended.run_dir / "result.json").read_text())["metrics"]
    assert metrics["benchmark/sleep_train_gpipe_2_stages_2/idle"] == facts["sleep_train_gpipe_2_stages_2"]["idle"]
    assert metrics["train/step"] == len(CASES)


def test_a_step_lasts_from_the_first_start_to_the_last_end() -> None:
    """Ranks leave a barrier apart: the last stage's own clock would make the step too short."""
    answers = [{"began_s": 5.0, "ended_s": 7.0, "busy_s": 2.0}, {"began_s": 5.5, "ended_s": 8.0, "busy_s": 1.0}]
    assert fold_ranks(answers, tokens=0) == {"step_s": 3.0, "idle_share": 0.5}


def test_passes_count_as_work_and_waiting_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch.distributed.pipelining import PipelineStage

    from launcher.benchmarks.pipeline_stages import BusyMeter

    class Sleeper(torch.nn.Module):
        def forward(self) -> None:
            time.sleep(UNIT_S)

    backward = ("backward_one_chunk", "backward_weight_one_chunk")
    for name in backward:
        monkeypatch.setattr(PipelineStage, name, lambda *_: time.sleep(2 * UNIT_S))
    stage, started = Sleeper(), time.perf_counter()
    meter = BusyMeter([stage], device=torch.device("cpu"))
    stage()
    time.sleep(10 * UNIT_S)
    for name in backward:
        getattr(PipelineStage, name)()
    assert 5 * UNIT_S <= meter.busy_s <= time.perf_counter() - started - 10 * UNIT_S


def gpipe_order(ranks: int, micro_batches: int) -> dict[int, list[tuple[int, str, int]]]:
    return {rank: [(rank, kind, number) for kind in "FB" for number in range(micro_batches)] for rank in range(ranks)}


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (2, 8), (4, 4), (4, 16)])
def test_formula_and_longest_path_agree(ranks: int, micro_batches: int) -> None:
    expected = (ranks - 1) / (micro_batches + ranks - 1)
    assert bubble_fraction("gpipe", ranks=ranks, micro_batches=micro_batches, chunks=1) == expected
    order = gpipe_order(ranks, micro_batches)
    assert longest_path(order, chunks=ranks) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "ranks", "micro_batches", "chunks", "expected"),
    [
        ("1f1b", 4, 4, 1, 3 / 7),
        ("interleaved_1f1b", 4, 8, 2, 3 / 19),
        ("interleaved_1f1b", 4, 3, 2, None),
        ("interleaved_zero_bubble", 4, 4, 2, 3 / 27),
        ("zbv", 4, 8, 2, 3 / 51),
        ("zbv", 4, 6, 2, None),
    ],
)
def test_formulas_give_what_the_papers_do(
    schedule: str, ranks: int, micro_batches: int, chunks: int, expected: float | None
) -> None:
    assert bubble_fraction(schedule, ranks=ranks, micro_batches=micro_batches, chunks=chunks) == expected


def test_a_schedule_that_is_not_what_its_formula_says_is_noticed() -> None:
    one = PipelineCase(passes="sleep", work="train", schedule="gpipe", stages=2, micro_batches=4)
    assert theory_of(one, gpipe_order(2, 4)) == pytest.approx(1 / 5)
    with pytest.raises(JobError, match=r"20\.00% by the formula, 33\.33% by the longest path"):
        theory_of(one, gpipe_order(2, 2))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("benchmark.stages=[4]",),
            r"backend\.ranks=2.*: benchmark\.stages=4 needs as many ranks; set backend\.ranks=4",
        ),
        (("benchmark.stages=[1,2]",), "must each be at least 2"),
        (("benchmark.micro_batches=[]",), "is empty or has duplicates"),
        (
            ("benchmark.micro_batches=[3]",),
            "4 sequences cannot be split into 3 micro-batches of equal size; set benchmark.batch_size=6",
        ),
        (("benchmark.schedules=[gpipe,gpipe]",), "is empty or has duplicates"),
        (
            ("benchmark.schedules=[zbv]", "model.num_hidden_layers=3"),
            r"zbv: 2 stages × 2 = 4 chunks, and there are 3 layers",
        ),
        (
            ("benchmark.schedules=[1f1b]", "benchmark.micro_batches=[1]", "benchmark.work=[train]"),
            "1f1b, 2 stages, 1 micro-batches: the schedule supports 2 micro-batches there",
        ),
        (("benchmark.unit_ms=0",), "must be above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(plan_of, words, message) -> None:
    with pytest.raises(ConfigErrors, match=message):
        plan_of(*TINY, *words)


def test_the_plan_says_what_is_left_out(plan_of) -> None:
    text = render_plan(plan_of("+exp=pipeline_bubble", hosts=[Host(name="box", slots=4, cores=4)]))
    assert "200 ms for a forward pass" in text
    assert "39 in each of 3 rounds" in text
    assert "1f1b, 4 stages, 2 micro-batches: the schedule supports 4 micro-batches there" in text
