"""``benchmark=serving``: a server of its own under closed and open load, by the real command."""

from __future__ import annotations

import json

import pytest

from launcher.errors import ConfigErrors

ECHO = (
    *("job=benchmark", "benchmark=serving", "parallel=single", "tracker=local", "model=gpt2_tiny", "backend.ranks=1"),
    *(
        "benchmark.serve={engine: echo, tokenizer: bytes, echo_step_s: 0.01, max_num_seqs: 4}",
        "benchmark.input_len=4-9",
    ),
    *("benchmark.output_len=2-8", "benchmark.extra_body={ignore_eos: true}"),
)


def test_levels_of_a_closed_loop_on_a_server_of_its_own(launch) -> None:
    ended = launch(*ECHO, "benchmark.max_concurrency=[1,4]", "benchmark.duration_s=3").expect(0)
    found = json.loads((ended.run_dir / "benchmark.json").read_text())
    assert list(found["cases"]) == ["max_concurrency=1", "max_concurrency=4"]
    one, four = (found["facts"][name]["rounds"][0] for name in found["cases"])
    assert one["errors"] == four["errors"] == 0
    assert one["requests"] > 3
    assert four["tokens_per_s"] > one["tokens_per_s"]  # the engine takes as long for four as for one
    assert 0 < one["ttft_p50_s"] < one["e2el_p50_s"]
    table = (ended.run_dir / "benchmark.md").read_text()
    assert "load generator: at most" in table
    assert "tokens/s" in table
    assert (ended.run_dir / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((ended.run_dir / "result.json").read_text())["metrics"]
    assert metrics["benchmark/max_concurrency=1/tokens_per_s"] > 0


def test_an_open_loop_over_a_trace_and_errors_by_kind(launch, tmp_path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"prompt": "abc", "max_tokens": 3}\n{"prompt": "abc", "max_tokens": -1}\n')
    words = ("benchmark.request_rate=[20]", "benchmark.duration_s=3", f"benchmark.trace={trace}")
    ended = launch(*ECHO, *words).expect(0)
    (answer,) = json.loads((ended.run_dir / "benchmark.json").read_text())["facts"]["request_rate=20"]["rounds"]
    assert answer["requests"] > 10
    assert answer["error/400"] == answer["errors"] > 10
    assert "errors 400 " in (ended.run_dir / "benchmark.md").read_text()


def test_a_server_that_is_not_there_ends_the_run(launch) -> None:
    words = ("job=benchmark", "benchmark=serving", "parallel=single", "tracker=local", "backend.ranks=1")
    ended = launch(*words, "benchmark.base_url=http://127.0.0.1:9").expect(1)
    assert "http://127.0.0.1:9 names no model: connect" in ended.output


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("benchmark.base_url=https://x", "is not an address"),
        ("benchmark.max_concurrency=[0]", "distinct numbers above 0"),
        ("benchmark.max_concurrency=[1.5]", "whole number"),
        ("benchmark.request_rate=[-1]", "distinct numbers above 0"),
        ("benchmark.max_concurrency=[]", "is empty"),
        ("benchmark.input_len=x", "not a distribution of lengths"),
        ("benchmark.serve={batchin: none}", r"benchmark\.serve\.batchin: no such option; did you mean batching"),
        ("benchmark.serve={max_num_seqs: 0}", "max_num_seqs"),
        ("benchmark.duration_s=0", "must be above 0"),
    ],
)
def test_what_measures_nothing_is_refused(plan_of, word, message) -> None:
    from launcher.protocol.plan import Host

    with pytest.raises(ConfigErrors, match=message):
        plan_of(
            "job=benchmark", "benchmark=serving", "parallel=single", word, hosts=[Host(name="box", slots=1, cores=4)]
        )
