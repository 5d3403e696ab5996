"""How fast text becomes tokens and tokens become batches, by the real command on Python's own documentation."""

from __future__ import annotations

import json

import pytest

from launcher.benchmarks.isolated import pack_component, unpack_component
from launcher.config.compose import compose
from launcher.data.dataset import open_stream
from launcher.data.token_cache import token_folder
from launcher.errors import ConfigErrors

WORDS = ("job=benchmark", "benchmark=data", "parallel=single", "tracker=local")


def test_the_command_tokenises_into_an_empty_cache_and_loads_from_a_full_one(launch, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} says that {i} times {i} is {i * i}." for i in range(3000)))
    cache = tmp_path / "cache"
    own = (f"data.path={text}", "data.vocab_size=300", f"data.cache={cache}")
    brief = ("benchmark.repeats=1", "benchmark.warmup=0", "benchmark.duration_s=0.2", "benchmark.sequence_length=32")
    ended = launch(*WORDS, *own, *brief).expect(0)
    assert not cache.exists(), "the run's own cache is no part of it"
    found = json.loads((ended.run_dir / "benchmark.json").read_text())
    corpus = compose([*WORDS, *own]).run
    folder, _ = token_folder(corpus.data, corpus.model, heartbeat=lambda: None)
    tokens = len(open_stream(folder))
    facts = found["facts"]
    assert facts["cold start"]["tokens"] == tokens
    assert facts["cold start"]["text_bytes"] == len(text.read_bytes())
    assert list(found["cases"]) == ["tokenise/1", "tokenise/all", "load"]
    for name in ("tokenise/1", "tokenise/all"):
        (rate,), (seconds,) = found["cases"][name]["tokens_per_s"], facts[name]["tokenise_s"]
        assert rate == pytest.approx(tokens / seconds)
        assert facts[name]["digest"] == facts["tokenise/1"]["digest"]
    load = found["cases"]["load"]
    assert load["tokens_per_s"][0] == pytest.approx(32 * load["sequences_per_s"][0])
    table = (ended.run_dir / "benchmark.md").read_text()
    for line in ("- tokenise by a thread a core: ", "- load: ", "- tokens: the same every time", "| case | tokens/s |"):
        assert line in table
    assert list(ended.run_dir.glob("tokens-*")) == []
    assert (ended.run_dir / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_batches_are_those_of_training(tmp_path) -> None:
    import hashlib

    from launcher.benchmarks.data import load_batches
    from launcher.data.dataloader import Loader
    from launcher.data.dataset import open_splits
    from launcher.protocol.plan import Batch

    run = compose([*WORDS, "data.vocab_size=300", f"data.cache={tmp_path}"]).run
    asked = {"sequence_length": 16, "micro_batch": 4, "duration_s": 0.05, "seed": 7, "warmup": 0}
    found = load_batches(run.data, run.model, **asked, progress=lambda: None)
    splits = open_splits(run.data, run.model, sequence_length=16, seed=7)
    loader = Loader(splits, Batch(micro_batch=4, gradient_accumulation_steps=1, data_parallel=1), seed=7, rank=0)
    digest = hashlib.sha256()
    for step in range(4):
        (batch,) = loader.step(step)
        digest.update(batch.input_ids.numpy().tobytes() + batch.labels.numpy().tobytes())
    assert found["digest"] == digest.hexdigest()


@pytest.mark.parametrize(
    "words", [("data.path=[a.txt,b.txt]",), ("data=hf", "data.path=wikitext", "data.held_out=0.1")]
)
def test_components_survive_the_way_into_another_process(words) -> None:
    run = compose([*WORDS, *words]).run
    for component in (run.data, run.model):
        assert unpack_component(json.loads(json.dumps(pack_component(component)))) == component


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data=synthetic",), r"data=synthetic.*: its tokens are made up.*; set data=text"),
        (("benchmark.threads=[]",), r"benchmark\.threads.*: needs distinct numbers"),
        (("benchmark.threads=[-1]",), r"benchmark\.threads.*: needs distinct numbers"),
        (("benchmark.duration_s=0",), r"benchmark\.duration_s=0.*: must be above 0"),
        (("benchmark.sequence_length=100000",), r"benchmark\.sequence_length=100000.*takes at most"),
        (("data.vocab_size=100000",), r"data\.vocab_size=100000.*embedding rows"),
    ],
)
def test_nonsense_is_refused(plan_of, words, message) -> None:
    from launcher.protocol.plan import Host

    with pytest.raises(ConfigErrors, match=message):
        plan_of(*WORDS, *words, hosts=[Host(name="box", slots=1, cores=4)])
