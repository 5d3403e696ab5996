"""The article's demonstration of a cache, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.benchmarks.registry import execute_benchmark
from launcher.config.compose import compose
from launcher.engines.context import Context
from launcher.errors import ConfigErrors
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.rundir import RunDir

WORDS = (
    *(
        "+exp=cache_gpt2",
        "tracker=local",
        "backend.ranks=1",
        "model=gpt2_tiny",
        "model.num_hidden_layers=2",
        "model.hidden_size=32",
    ),
    *("model.num_attention_heads=2", "model.vocab_size=257", "benchmark.max_length=40", "benchmark.repeats=2"),
)


def test_the_last_prompt_repeats_the_first(tmp_path: Path) -> None:
    run = compose(WORDS).run
    context = Context(run=run, run_dir=RunDir(tmp_path), rank=0, local_rank=0, world_size=1, heartbeat=Heartbeat(None))
    results = execute_benchmark(context)
    cache = results.facts["cache"]
    assert (cache["hits"], cache["misses"], cache["hit_rate"], cache["size"]) == (1, 3, 0.25, 3)
    assert 0 < cache["size_bytes"] < cache["max_bytes"] == 64 * 2**20
    assert results.findings[0] == "hit rate 25.0%, hits 1, misses 3"
    samples = {case.name: len(case.samples["answer_s"]) for case in results.cases}
    assert samples == {"computed": 6, "kept": 2}


@pytest.mark.parametrize("word", ["benchmark.prompts=[]", "benchmark.prompts=['']", "benchmark.max_length=1"])
def test_nothing_to_measure_is_refused(word: str) -> None:
    with pytest.raises(ConfigErrors, match=word.partition("=")[0]):
        compose([*WORDS, word])
