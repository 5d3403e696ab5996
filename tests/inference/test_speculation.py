"""Answers with drafts are those without: token for token, or in distribution; what drafts cost is counted."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from launcher.config.inference import EngineLimits
from launcher.config.sampling import SamplingParams
from launcher.errors import ConfigError
from launcher.inference.engine.base import EngineOutput, EngineRequest
from launcher.inference.engine.block_manager import BLOCK_SIZE
from launcher.inference.engine.draft_lengths import Draft, DraftLengths, SpeedTrial
from launcher.inference.engine.layer_skipping import ExitStates
from launcher.inference.engine.paged_engine import PagedEngine, paged_engine_for
from launcher.inference.engine.sampler import SamplerState, sample_drafts
from launcher.inference.engine.scheduler import ScheduledStep
from launcher.inference.engine.sequence import SequenceGroup
from launcher.inference.engine.speculation import DraftSampler
from launcher.inference.engine.step_plan import StepPlan
from tests.inference.models import CONTEXT, END, VOCABULARY, alone, finish, stock, tokens

DRAFTS = {"speculation": "early_exit", "speculation_layers": 1, "speculation_adaptive": False}
COMMON = tuple(range(7, 7 + 70))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def served(
    family: str,
    requests: Sequence[EngineRequest],
    *,
    dtype: torch.dtype = torch.float32,
    kernels: bool = False,
    **limits: object,
) -> tuple[dict[str, list[EngineOutput]], PagedEngine]:
    model = copy.deepcopy(stock(family)).to(dtype)
    paged = paged_engine_for(model, limits=EngineLimits(**limits), eos_token_ids=(END,), kernels=kernels)
    return finish(paged, requests), paged


def answers(found: dict[str, list[EngineOutput]]) -> dict[str, tuple[object, ...]]:
    """Return the tokens of each request with their log-probabilities, and why it ended."""
    return {
        name: (*(token for update in updates for token in update.tokens), updates[-1].finish_reason, updates[-1].error)
        for name, updates in found.items()
    }


def mixed(count: int, *, seed: int) -> list[EngineRequest]:
    """Return requests of all kinds whose tokens are determined."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        shared = COMMON[: chance.choice([0, 0, 31, 32, 33, 64, 70])]
        prompt = (*shared, *(chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 30))))
        sampling = SamplingParams(
            max_tokens=chance.choice([1, 2, 7, 24, 60]),
            temperature=chance.choice([0.0, 0.0, 1.0]),
            top_k=chance.choice([0, 0, 5]),
            top_p=chance.choice([1.0, 0.9]),
            seed=number,
            logprobs=chance.choice([None, None, 2]),
            stop_token_ids=tuple(chance.sample(range(VOCABULARY), chance.choice([0, 0, 4]))),
            repetition_penalty=chance.choice([1.0, 1.0, 1.2]),
            frequency_penalty=chance.choice([0.0, 0.0, 0.4]),
            no_repeat_ngram_size=chance.choice([0, 0, 2]),
            min_tokens=chance.choice([0, 0, 3]),
            logit_bias=((5, 2.0),) if chance.random() < 0.2 else (),
        )
        if number < 6:  # together they outgrow a small cache
            prompt = prompt[-20:]
            sampling = dataclasses.replace(sampling, max_tokens=60, ignore_eos=True, stop_token_ids=())
        if number % 9 == 8:
            sampling = SamplingParams(max_tokens=8, num_beams=2)
        made.append(EngineRequest(id=str(number), prompt=prompt[: CONTEXT - 1], sampling=sampling))
    return made


@pytest.mark.parametrize(("family", "kernels"), [("llama", True), ("gpt2", False)], ids=["kernels", "stock"])
def test_answers_are_those_without_drafts_in_any_batch(family: str, kernels: bool) -> None:
    requests = mixed(18, seed=1)
    plain, _ = served(family, requests, kernels=kernels, max_num_seqs=6, kv_cache_tokens=512, prefill_chunk_size=16)
    expected = answers(plain)
    for limits in (
        {"max_num_seqs": 6, "kv_cache_tokens": 192, "prefill_chunk_size": 16, "speculation_tokens": 5},
        {"max_num_seqs": 2, "speculation_tokens": 3, "enable_prefix_caching": False},
        {"max_num_seqs": 18, "speculation_tokens": 1, "prefill_chunk_size": 256},
    ):
        found, paged = served(family, requests, kernels=kernels, **DRAFTS, **limits)
        got = answers(found)
        for name, answer in expected.items():
            # sums of fp32 in another order; compiled kernels keep the order, and give equal bits
            assert_same(got[name], answer, tolerance=0.0 if kernels else 1e-4)
        stats = paged.stats()
        assert 0 < stats.accepted_tokens_total < stats.draft_tokens_total
        assert stats.kv_cache_tokens == 0
        if "kv_cache_tokens" in limits:
            assert stats.preemptions_total, "the cache is too small for all"


def assert_same(got: tuple[object, ...], expected: tuple[object, ...], *, tolerance: float) -> None:
    assert [getattr(each, "id", each) for each in got] == [getattr(each, "id", each) for each in expected]
    for one, other in zip(got, expected, strict=True):
        if hasattr(one, "logprob") and one.logprob is not None:
            assert one.logprob == pytest.approx(other.logprob, abs=tolerance)
            assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=tolerance)


def test_half_precision_is_the_same_to_the_bit_and_greedy_answers_are_the_stock_models() -> None:
    requests = mixed(12, seed=2)
    plain, _ = served("llama", requests, dtype=torch.bfloat16, kernels=True)
    found, _ = served("llama", requests, dtype=torch.bfloat16, kernels=True, **DRAFTS)
    assert answers(found) == answers(plain)
    prompts = [COMMON[:length] for length in (1, 5, 31, 64)]
    greedy = [
        EngineRequest(id=str(at), prompt=prompt, sampling=SamplingParams(max_tokens=40))
        for at, prompt in enumerate(prompts)
    ]
    found, _ = served("llama", greedy, **DRAFTS)
    assert [tokens(found[str(at)]) for at in range(4)] == [alone("llama", prompt, 40) for prompt in prompts]


def test_each_verified_token_runs_each_layer_once_and_rejected_slots_are_free_again() -> None:
    model = copy.deepcopy(stock("gpt2"))
    rows = [0, 0]
    for number, block in enumerate(model.transformer.h):
        forward = block.forward

        def counted(hidden, *rest, number=number, forward=forward, **named):
            rows[number] += hidden.shape[1]
            return forward(hidden, *rest, **named)

        block.forward = counted
    limits = EngineLimits(enable_prefix_caching=False, kv_cache_tokens=1024, speculation_tokens=6, **DRAFTS)
    paged = paged_engine_for(model, limits=limits, eos_token_ids=(), kernels=False)
    rows[:] = [0, 0]
    ways = SamplingParams(max_tokens=50, ignore_eos=True)
    for at in range(3):
        paged.add(EngineRequest(id=str(at), prompt=COMMON[: 29 + at], sampling=ways))
    longest = 0
    while not paged.idle:
        paged.step()
        running = [sequence for group in paged._scheduler.running for sequence in group.sequences]
        used = sum(-(-sequence.num_computed // BLOCK_SIZE) for sequence in running)
        assert paged._scheduler.block_manager.num_used == used
        assert all(sequence.num_uncomputed == 1 for sequence in running)
        longest = max([longest, *(len(sequence.block_table) for sequence in running)])
    stats = paged.stats()
    prompts = sum(29 + at for at in range(3))
    assert longest > 1
    assert (
        rows[0]
        == rows[1]
        == prompts + (stats.decoded_tokens_total - stats.accepted_tokens_total) + (stats.draft_tokens_total)
    )
    assert stats.decoded_tokens_total == 3 * 49
    # of two layers one drafts: half a pass for each draft, one for each verification
    steps = stats.decoded_tokens_total - stats.accepted_tokens_total
    assert stats.decoding_passes_total == pytest.approx(steps + stats.draft_tokens_total / 2)


SIZE = 6
"""Tokens of the models below, which know the last token alone."""


class Chain:
    """Scores that depend on the last token alone."""

    isolates = True

    def __init__(self, seed: int, *, breaks_at: int | None = None) -> None:
        self.scores = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 1.5
        self._breaks_at = breaks_at
        self.plans: list[StepPlan] = []

    def run(self, plan: StepPlan) -> torch.Tensor:
        self.plans.append(plan)
        if any(part.num_drafts and self._breaks_at in part.tokens for part in plan.segments):
            raise ArithmeticError("cannot be verified")
        return self.scores[[token for part in plan.segments for token in part.tokens[-part.num_logits :]]]

    def close(self) -> None:
        pass


class ChainDrafter:
    """Drafts with another chain."""

    first_layer, cost = 0, 0.1

    def __init__(self, sampler: DraftSampler, chain: Chain) -> None:
        self._sampler, self._chain = sampler, chain

    def draft(self, step: ScheduledStep) -> list[Draft | None]:
        made: list[Draft | None] = []
        for sequence, length in zip(step.sequences, step.draft_lengths, strict=True):
            draft = Draft([], [])
            for _ in range(length):
                last = [*sequence.tokens, *draft.tokens][-1]
                ((token, probabilities),) = self._sampler.sample_drafts(
                    [sequence], [draft.tokens], self._chain.scores[[last]].clone()
                )
                draft.tokens.append(token)
                draft.probabilities.append(probabilities)
            made.append(draft if length else None)
        return made


def chained(target: Chain, drafting: Chain, **limits: object) -> PagedEngine:
    return PagedEngine(
        target,
        limits=EngineLimits(speculation_adaptive=False, **limits),
        num_blocks=64,
        max_model_len=CONTEXT,
        vocab_size=SIZE,
        eos_token_ids=(),
        make_drafter=lambda sampler: ChainDrafter(sampler, drafting),
    )


@pytest.mark.parametrize("top_k", [0, 4])
def test_samples_without_a_seed_have_the_models_distribution(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = itertools.count()

    def seeded(state: SamplerState) -> None:
        state.generator = torch.Generator().manual_seed(next(seeds))

    monkeypatch.setattr(SamplerState, "__post_init__", seeded)
    target, drafting = Chain(1), Chain(2)
    paged = chained(target, drafting, speculation_tokens=3, max_num_seqs=64)
    way = SamplingParams(max_tokens=4, temperature=1.0, top_k=top_k, ignore_eos=True)
    count = 1200
    found = finish(paged, [EngineRequest(id=str(at), prompt=(0,), sampling=way) for at in range(count)])
    stats = paged.stats()
    assert 0.2 < stats.acceptance < 0.9
    scores = target.scores
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], float("-inf"))
    chance = scores.double().softmax(-1)
    pairs = [tuple(tokens(updates)) for updates in found.values()]
    for first in range(3):  # the joint distribution of two tokens in a row, at each place of a draft
        counts = torch.zeros(SIZE, SIZE, dtype=torch.float64)
        for pair in pairs:
            counts[pair[first], pair[first + 1]] += 1
        state = torch.zeros(SIZE, dtype=torch.float64)
        state[0] = 1
        for _ in range(first + 1):
            state = state @ chance
        expected = state[:, None] * chance * count
        assert not counts[expected == 0].any()
        common = expected >= 5  # rarer pairs are one cell, as the test needs
        counts, expected = (torch.cat([of[common], of[~common].sum()[None]]) for of in (counts, expected))
        statistic = float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum())
        # chi-square with at most 36 degrees of freedom is above 68 once in a thousand times; the seeds are fixed
        assert statistic < 68, (first, statistic)


def test_seeded_samples_are_the_same_with_drafts_of_any_length() -> None:
    target, drafting = Chain(1), Chain(2)
    requests = [
        EngineRequest(id=str(seed), prompt=(0,), sampling=SamplingParams(max_tokens=30, temperature=1.0, seed=seed))
        for seed in range(20)
    ]
    plain = PagedEngine(
        target, limits=EngineLimits(), num_blocks=64, max_model_len=CONTEXT, vocab_size=SIZE, eos_token_ids=()
    )
    expected = answers(finish(plain, requests))
    for most in (1, 4, 9):
        paged = chained(target, drafting, speculation_tokens=most, max_num_seqs=most)
        assert answers(finish(paged, requests)) == expected
        if most == 1:
            assert paged.stats().acceptance > 0.3, "the draft draws with the same random numbers"


def test_a_draft_that_cannot_be_verified_costs_no_request() -> None:
    target = Chain(1, breaks_at=2)
    way = SamplingParams(max_tokens=40, temperature=1.0, seed=1)
    requests = [EngineRequest(id=str(at), prompt=(at,), sampling=way) for at in range(3)]
    plain = PagedEngine(
        Chain(1), limits=EngineLimits(), num_blocks=64, max_model_len=CONTEXT, vocab_size=SIZE, eos_token_ids=()
    )
    paged = chained(target, Chain(2))
    assert answers(finish(paged, requests)) == answers(finish(plain, requests))
    assert any(part.num_drafts and 2 in part.tokens for plan in target.plans for part in plan.segments)


def test_no_token_is_drafted_that_nothing_could_follow() -> None:
    paged = chained(target := Chain(1), target, speculation_tokens=8)
    ways = [SamplingParams(max_tokens=count) for count in (1, 2, 3, 12)]
    found = finish(paged, [EngineRequest(id=str(way.max_tokens), prompt=(0,), sampling=way) for way in ways])
    assert [len(tokens(updates)) for updates in found.values()] == [1, 2, 3, 12]
    stats = paged.stats()
    assert stats.acceptance == 1.0, "the model drafts for itself"
    assert stats.draft_tokens_total == sum(
        max(0, way.max_tokens - 1 - stats_drafts) for way, stats_drafts in zip(ways, (0, 0, 0, 1), strict=True)
    )


def group_of(max_tokens: int = 100) -> SequenceGroup:
    way = SamplingParams(max_tokens=max_tokens)
    return SequenceGroup(EngineRequest(id="a", prompt=(1, 2, 3), sampling=way), 0.0)


def test_drafts_shorten_where_few_tokens_are_accepted_and_grow_where_all_are() -> None:
    lengths = DraftLengths(4, max_model_len=64, adaptive=True, clock=lambda: 0.0)
    group = group_of()
    (sequence,) = group.sequences
    found = []
    for taken in (1, 0, 0, 1, 2, 3):
        lengths.begin(1)
        found.append(lengths.length(sequence))
        lengths.record({group: (found[-1], taken)}, tokens=1 + taken, is_timed=False)
    assert found == [4, 2, 1, 1, 2, 3]
    assert lengths.length(sequence) == 4
    lengths.release(group)
    assert lengths.length(sequence) == 4
    assert lengths.length(group_of(3).sequences[0]) == 2
    assert DraftLengths(4, max_model_len=5, adaptive=False).length(sequence) == 1


@pytest.mark.parametrize("gain", [0.8, 1.25])
def test_the_faster_way_has_nearly_all_steps(gain: float) -> None:
    trial = SpeedTrial()
    drafted = []
    for _ in range(3000):
        drafted.append(trial.drafts)
        trial.record(tokens=1, seconds=1 / gain if trial.drafts else 1.0)
    share = sum(drafted) / len(drafted)
    assert share > 0.95 if gain > 1 else share < 0.05
    assert True in drafted[-3000:]
    assert False in drafted


def test_the_way_changes_with_the_load() -> None:
    now = 0.0
    lengths = DraftLengths(4, max_model_len=64, adaptive=True, clock=lambda: now)
    drafted: dict[int, list[bool]] = {1: [], 16: []}
    for step in range(800):
        count = (1, 16)[step // 20 % 2]
        drafts = lengths.begin(count)
        drafted[count].append(drafts)
        now += 1.0 if not drafts else 1.5 if count == 1 else 4.0
        lengths.record({}, tokens=count * (2 if drafts else 1), is_timed=True)
    assert sum(drafted[1]) > 300
    assert sum(drafted[16]) < 50


def test_drafts_follow_the_penalties_of_their_request() -> None:
    way = SamplingParams(max_tokens=9, temperature=0.0, repetition_penalty=1.5, no_repeat_ngram_size=1)
    state = SamplerState(way, (0, 1), [2])
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0]])
    assert sample_drafts(scores.clone(), [state], [[3]], eos_token_ids=()) == [(4, None)]
    assert state.output == [2]
    plain = dataclasses.replace(way, repetition_penalty=1.0, no_repeat_ngram_size=0)
    assert sample_drafts(scores.clone(), [SamplerState(plain, (0, 1), [2])], [[3]], eos_token_ids=()) == [(0, None)]


def test_a_model_whose_layers_are_not_found_is_refused() -> None:
    model = copy.deepcopy(stock("llama"))
    model.config.num_hidden_layers = 3
    with pytest.raises(ConfigError, match=r"job\.speculation=early_exit: the layers of llama are not one list"):
        ExitStates(model)
