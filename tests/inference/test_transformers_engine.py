"""Transformers' continuous batching behind our interface: exact, and not to be ended by any request."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest

from launcher.config.compose import compose
from launcher.config.inference import EngineLimits
from launcher.config.sampling import SamplingParams
from launcher.errors import ConfigError, JobError
from launcher.inference.engine.base import EngineRequest, InvalidRequest
from launcher.inference.engine.transformers_engine import (
    TransformersEngine,
    make_transformers_engine,
    transformers_engine_for,
)
from tests.inference.models import CONTEXT, END, FAMILIES, VOCABULARY, alone, finish, stock, tokens


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(family: str) -> Iterator[TransformersEngine]:
    limits = EngineLimits(kv_cache_tokens=1024, max_num_seqs=3, prefill_chunk_size=16)
    made = transformers_engine_for(copy.deepcopy(stock(family)), limits=limits, eos_token_ids=(END,))
    assert isinstance(made, TransformersEngine)
    yield made
    made.close()


def requests(count: int, **sampling: int) -> list[EngineRequest]:
    way = SamplingParams(**{"max_tokens": 16, **sampling})
    return [EngineRequest(id=str(n), prompt=tuple(range(n, 3 * n + 2)), sampling=way) for n in range(count)]


def test_results_are_those_of_each_request_alone(engine: TransformersEngine, family: str) -> None:
    engine.warm_up([(2, 10), (1, 20)])
    assert engine.stats().generated_tokens_total == 0
    asked = requests(8)
    found = finish(engine, asked)
    for request in asked:
        assert tokens(found[request.id]) == alone(family, request.prompt, 16)
        assert found[request.id][-1].finish_reason == ("stop" if tokens(found[request.id])[-1] == END else "length")
    stats = engine.stats()
    assert stats.generated_tokens_total == sum(len(tokens(updates)) for updates in found.values())
    assert (stats.running, stats.waiting, stats.since_step_s) == (0, 0, 0.0)
    through = finish(engine, requests(8, ignore_eos=True))
    assert [len(tokens(updates)) for updates in through.values()] == [16] * 8


def test_cancelled_and_late_requests_get_a_last_word(engine: TransformersEngine) -> None:
    running, *others = requests(3, max_tokens=100, ignore_eos=True)
    engine.add(running)
    while not engine.step():
        pass
    for request in others:
        engine.add(EngineRequest(id=request.id, prompt=request.prompt, sampling=request.sampling, deadline_s=0.0))
    engine.cancel(running.id)
    ends = {update.request_id: update.finish_reason for update in engine.step()}
    assert ends == {"0": "cancelled", "1": "timeout", "2": "timeout"}
    assert engine.idle
    assert len(tokens(finish(engine, requests(1, ignore_eos=True))["0"])) == 16


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ((1,), {"temperature": 0.5}, "temperature"),
        ((1,), {"logprobs": 1}, "logprobs"),
        ((1,), {"num_beams": 2}, "num_beams"),
        ((VOCABULARY,), {}, "prompt"),
        ((1,) * CONTEXT, {}, "prompt"),
    ],
)
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_what_it_cannot_do_is_refused_and_the_next_request_served(
    engine: TransformersEngine, prompt: tuple[int, ...], sampling: dict[str, float], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        engine.add(EngineRequest(id="x", prompt=prompt, sampling=SamplingParams(max_tokens=4, **sampling)))
    assert refusal.value.param == field
    assert len(tokens(finish(engine, requests(1, ignore_eos=True))["0"])) == 16


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_request_that_cannot_be_handed_over_ends_alone(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over = engine._manager.add_request

    def fails(prompt: list[int], **options: object) -> object:
        if len(prompt) == len(requests(2)[1].prompt):
            raise ArithmeticError("unlucky")
        return hand_over(prompt, **options)

    monkeypatch.setattr(engine._manager, "add_request", fails)
    found = finish(engine, requests(3, ignore_eos=True))
    assert [len(tokens(found[name])) for name in ("0", "1", "2")] == [16, 0, 16]
    assert (found["1"][-1].finish_reason, found["1"][-1].error) == ("error", "ArithmeticError: unlucky")


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_when_its_thread_ends_no_request_is_blamed_and_the_engine_fails(engine: TransformersEngine) -> None:
    for request in requests(2, max_tokens=100, ignore_eos=True):
        engine.add(request)
    while not engine.step():
        pass
    engine._manager.stop(block=True, hard_stop=True)

    def go_on() -> None:
        for _ in range(400):
            assert not any(update.finish_reason for update in engine.step())

    with pytest.raises(JobError, match="has ended"):
        go_on()


def test_without_a_gpu_it_is_refused_with_what_works() -> None:
    run = compose(["model=llama_tiny", "precision=fp32", "job=serve", "job.engine=transformers"]).run
    with pytest.raises(ConfigError, match=r"there is none here; .*set job.engine=paged"):
        make_transformers_engine(run, limits=EngineLimits(), heartbeat=lambda: None)
