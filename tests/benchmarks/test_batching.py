"""Row 6 of the article: its fifty requests one by one and in each batching mode, by the real command."""

from __future__ import annotations

import json

import pytest

from launcher.errors import ConfigErrors
from launcher.planning.render import render_plan

TINY = (
    *(
        "+exp=batching_gpt2",
        "tracker=local",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "model.hidden_size=32",
        "model.max_position_embeddings=64",
    ),
    *("model.vocab_size=257", "benchmark.repeats=1", "benchmark.output_len=2-6"),
)


def test_the_articles_requests_get_the_same_answers_in_every_mode(launch) -> None:
    ended = launch(*TINY).expect(0)
    found = json.loads((ended.run_dir / "benchmark.json").read_text())
    assert list(found["cases"]) == ["none", "static", "dynamic", "continuous"]
    facts = found["facts"]
    assert len({fact["answers"] for fact in facts.values()}) == 1
    assert len({fact["tokens"] for fact in facts.values()}) == 1
    assert 50 * 2 < facts["none"]["tokens"] < 50 * 6
    assert facts["none"]["padding_share"] == 0
    for case in found["cases"].values():
        assert case["requests_per_s"][0] == pytest.approx(50 / case["elapsed_s"][0])
    table = (ended.run_dir / "benchmark.md").read_text()
    for word in ("none: 50 requests in ", " ms a request", "answers: the same in every mode (precision=fp32)"):
        assert word in table
    assert (ended.run_dir / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_batches_of_like_length_need_less_padding_than_batches_in_order_of_arrival(launch) -> None:
    words = (
        "benchmark.input_len=2-40",
        "benchmark.output_len=2",
        "benchmark.bucket_size=8",
        "benchmark.modes=[static,dynamic]",
    )
    ended = launch(*TINY, *words, "benchmark.max_batch_size=8").expect(0)
    found = json.loads((ended.run_dir / "benchmark.json").read_text())["facts"]
    assert 0 < found["dynamic"]["padding_share"] < found["static"]["padding_share"]
    assert found["dynamic"]["answers"] == found["static"]["answers"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("benchmark.modes=[]", "is empty or has duplicates"),
        ("benchmark.modes=[none,none]", "is empty or has duplicates"),
        ("benchmark.input_len=many", "not a distribution of lengths"),
        ("benchmark.num_prompts=0", "must be at least 1"),
    ],
)
def test_what_compares_nothing_is_refused(plan_of, word, message) -> None:
    with pytest.raises(ConfigErrors, match=message):
        plan_of(*TINY, word)


def test_the_plan_names_model_and_queue(plan_of) -> None:
    from launcher.protocol.plan import Host

    text = render_plan(plan_of("+exp=batching_gpt2", hosts=[Host(name="box", slots=1, cores=4)]))
    assert "gpt2, weights=random, precision=fp32" in text
    assert "50 requests of article" in text
