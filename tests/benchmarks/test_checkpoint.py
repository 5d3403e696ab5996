"""Saving on real ranks: what training waits for, and that what is restored is what was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import ConfigErrors

TINY = (
    *("job=benchmark", "benchmark=checkpoint", "tracker=local", "backend.ranks=2", "backend.threads=1"),
    *(
        "model.num_hidden_layers=2",
        "model.hidden_size=64",
        "model.num_attention_heads=2",
        "model.max_position_embeddings=32",
        "model.vocab_size=256",
    ),
    *("benchmark.saves=2", "benchmark.every=1", "benchmark.sequence_length=16", "benchmark.repeats=1"),
)
STATE_BYTES = 12 * ((256 + 32) * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64)
"""Weights and both moments."""


def results(run_dir: Path) -> dict:
    assert not (run_dir / "saved").exists(), "checkpoints are left behind"
    return json.loads((run_dir / "benchmark.json").read_text())


def test_each_way_to_save_is_measured_and_restores_what_it_saved(launch) -> None:
    ended = launch(*TINY, "parallel=ddp", "benchmark.modes=[none,disabled,async,dcp_save,dcp_async_save]").expect(0)
    found = results(ended.run_dir)
    cases = found["cases"]
    assert list(cases) == ["none", "disabled", "async", "dcp_save", "dcp_async_save"]
    assert list(cases["none"]) == ["loop_s", "step_s"]
    for way in list(cases)[1:]:
        case = {key: values[0] for key, values in cases[way].items()}
        assert STATE_BYTES < case["checkpoint_bytes"] < 1.2 * STATE_BYTES
        assert case["written_mb_per_s"] == pytest.approx(case["checkpoint_bytes"] / case["durable_s"] / 1e6)
        assert case["added_per_save_s"] == pytest.approx((case["loop_s"] - cases["none"]["loop_s"][0]) / 2)
        assert min(case["stall_s"], case["restore_s"]) > 0
        ranks = found["facts"][way]["rounds"][0]
        assert [len(rank["stalls_s"]) for rank in ranks] == [2, 2]
        assert [len(rank["steps_s"]) for rank in ranks] == [3, 3]
        assert len(ranks[0]["durable_s"]) == 2
    page = (ended.run_dir / "benchmark.md").read_text()
    assert "disabled: training pauses for " in page
    assert page.count("weights equal bit for bit") == 4
    assert "async pauses for " in page
    metrics = json.loads((ended.run_dir / "result.json").read_text())["metrics"]
    assert metrics["benchmark/async/stall_s"] == cases["async"]["stall_s"][0]


def test_deepspeed_saves_as_it_does(launch) -> None:
    ended = launch(*TINY, "parallel=zero1", "benchmark.modes=[disabled,deepspeed]").expect(0)
    for case in results(ended.run_dir)["cases"].values():
        assert "added_per_save_s" not in case, "nothing was measured that it could be added to"
        assert case["checkpoint_bytes"][0] > STATE_BYTES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("parallel=zero1", "benchmark.modes=[dcp_save]"),
            r"parallel=zero has no tensors.*; leave dcp_save out",
        ),
        (
            ("parallel=ddp", "benchmark.modes=[deepspeed]"),
            r"does not train with DeepSpeed; leave deepspeed",
        ),
        (("benchmark.modes=[]",), "is empty or has duplicates"),
        (("benchmark.modes=[none]",), "saves nothing"),
        (("benchmark.modes=[async,async]",), "is empty or has duplicates"),
        (("benchmark.saves=0",), "must be at least 1"),
        (("benchmark.sequence_length=33",), "takes at most 32 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(plan_of, words, message) -> None:
    with pytest.raises(ConfigErrors, match=message):
        plan_of(*TINY, *words)
