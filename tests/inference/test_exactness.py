"""Whatever comes when, beside whom, and however much is let in at a time: each result is that of the request alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import EngineOutput, EngineRequest
from tests.inference.models import CONTEXT, FAMILIES, VOCABULARY, alone, engine, finish, tokens

COMMON = tuple(range(7, 7 + 80))
"""What many prompts begin with: longer than two pages."""

prompts = st.builds(
    lambda shared, own: (*COMMON[:shared], *own)[: CONTEXT - 1],
    st.sampled_from([0, 0, 31, 32, 33, 64, 80]),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40),
)
random_ways = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 5, 200]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    no_repeat_ngram_size=st.sampled_from([0, 2]),
    seed=st.integers(0, 5),
)
greedy_ways = st.builds(SamplingParams, max_tokens=st.integers(1, 24))
limits = st.fixed_dictionaries(
    {
        "batching": st.sampled_from(["continuous", "continuous", "continuous", "none", "static", "dynamic"]),
        "max_num_seqs": st.integers(1, 6),
        "max_batch_size": st.integers(1, 5),
        "max_wait_s": st.just(0.0),
        "prefill_chunk_size": st.sampled_from([1, 3, 16, 256]),
        "enable_prefix_caching": st.booleans(),
        "kv_cache_tokens": st.sampled_from([CONTEXT, 256, 1024]),
    }
)
few = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # an example takes long: to make a failing one small would take minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing by threads, which on a busy machine wait for each other at every operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Arrival:
    at_step: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    cancelled_after: int | None
    priority: int


arrivals = st.lists(
    st.builds(
        Arrival,
        at_step=st.integers(0, 12),
        prompt=prompts,
        sampling=st.one_of(greedy_ways, random_ways),
        cancelled_after=st.one_of(st.none(), st.none(), st.integers(0, 10)),
        priority=st.integers(0, 2),
    ),
    min_size=1,
    max_size=9,
)
_seeded: dict[tuple[str, tuple[int, ...], SamplingParams], list[int]] = {}


def expected(family: str, arrival: Arrival) -> list[int]:
    if arrival.sampling.temperature == 0:
        return alone(family, arrival.prompt, arrival.sampling.max_tokens)
    key = (family, arrival.prompt, arrival.sampling)
    if key not in _seeded:
        paged = engine(family, max_num_seqs=1, enable_prefix_caching=False, kv_cache_tokens=CONTEXT)
        request = EngineRequest(id="alone", prompt=arrival.prompt, sampling=arrival.sampling)
        _seeded[key] = tokens(finish(paged, [request])["alone"])
    return _seeded[key]


def serve(family: str, coming: list[Arrival], *, kernels: bool, options: dict[str, Any]) -> None:
    paged = engine(family, kernels=kernels, **options)
    found: dict[int, list[EngineOutput]] = {index: [] for index in range(len(coming))}
    for step in range(3000):
        for index, arrival in enumerate(coming):
            if arrival.at_step == step:
                request = EngineRequest(
                    id=str(index), prompt=arrival.prompt, sampling=arrival.sampling, priority=arrival.priority
                )
                paged.add(request)
            if arrival.cancelled_after is not None and arrival.at_step + arrival.cancelled_after == step:
                paged.cancel(str(index))
        for update in paged.step():
            found[int(update.request_id)].append(update)
        if step > 12 and paged.idle:
            break
    assert paged.idle
    assert paged._scheduler.block_manager.num_used == 0
    for index, arrival in enumerate(coming):
        assert [update.finish_reason for update in found[index]].count(None) == len(found[index]) - 1
        last = found[index][-1]
        wanted = expected(family, arrival)
        if last.finish_reason == "cancelled":
            assert arrival.cancelled_after is not None
            assert tokens(found[index]) == wanted[: len(tokens(found[index]))]
        else:
            assert last.finish_reason in ("stop", "length"), last
            assert tokens(found[index]) == wanted


@pytest.mark.parametrize("kernels", [False, True], ids=["stock", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_result_is_that_of_the_request_alone(family: str, kernels: bool) -> None:
    @few
    @given(coming=arrivals, options=limits)
    def holds(coming: list[Arrival], options: dict[str, Any]) -> None:
        serve(family, coming, kernels=kernels, options=options)

    holds()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_beginning_is_computed_once_and_changes_nothing(family: str) -> None:
    paged = engine(family, kv_cache_tokens=1024)
    first = EngineRequest(id="0", prompt=COMMON, sampling=SamplingParams(max_tokens=9))
    finish(paged, [first])
    again = [dataclasses.replace(first, id="1"), dataclasses.replace(first, id="2", prompt=(*COMMON[:70], 5, 6))]
    found = finish(paged, again)
    assert [found[name][0].num_cached_tokens for name in ("1", "2")] == [64, 64]
    assert tokens(found["1"]) == alone(family, COMMON, 9)
    assert tokens(found["2"]) == alone(family, again[1].prompt, 9)


def test_requests_are_put_back_for_want_of_room_and_nothing_is_lost() -> None:
    paged = engine("llama", kv_cache_tokens=192, max_num_seqs=6, enable_prefix_caching=False)
    requests = [
        EngineRequest(
            id=str(index), prompt=(index, *COMMON[:20]), sampling=SamplingParams(max_tokens=60, ignore_eos=True)
        )
        for index in range(6)
    ]
    found = finish(paged, requests)
    assert paged.stats().preemptions_total > 0
    for request in requests:
        assert len(tokens(found[request.id])) == 60
    fresh = engine("llama", kv_cache_tokens=128, max_num_seqs=1)
    assert finish(fresh, requests).keys() == found.keys()
    again = finish(engine("llama", kv_cache_tokens=128, max_num_seqs=1), requests)
    assert {name: tokens(updates) for name, updates in again.items()} == {n: tokens(u) for n, u in found.items()}
