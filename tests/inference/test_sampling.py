"""Ways of sampling are those of Transformers' logits processors, each sequence by its own."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from launcher.config.sampling import SamplingParams
from launcher.inference.engine.sampler import SamplerState, apply_penalties, filter_logits, make_tokens, sample_tokens

SIZE, END = 50, 2
ids = st.integers(0, SIZE - 1)
ways = st.builds(
    SamplingParams,
    max_tokens=st.just(9),
    min_tokens=st.sampled_from([0, 3]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 7, 90]),
    top_p=st.sampled_from([1.0, 0.8, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.8]),
    no_repeat_ngram_size=st.sampled_from([0, 1, 2, 3]),
    logit_bias=st.sampled_from([(), ((4, 2.5), (END, -1.0))]),
    seed=st.just(0),
)
pasts = st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.lists(st.integers(0, 6), max_size=9))


def reference(scores: torch.Tensor, way: SamplingParams, prompt: list[int], output: list[int]) -> torch.Tensor:
    chain = LogitsProcessorList()
    if way.logit_bias:
        chain.append(SequenceBiasLogitsProcessor({(token,): added for token, added in way.logit_bias}))
    if way.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(way.repetition_penalty))
    if way.no_repeat_ngram_size:
        chain.append(NoRepeatNGramLogitsProcessor(way.no_repeat_ngram_size))
    if way.min_tokens:
        chain.append(MinNewTokensLengthLogitsProcessor(len(prompt), way.min_tokens, END, device="cpu"))
    chain.append(TemperatureLogitsWarper(way.temperature))
    if way.top_k:
        chain.append(TopKLogitsWarper(way.top_k))
    if way.top_p < 1:
        chain.append(TopPLogitsWarper(way.top_p))
    if way.min_p:
        chain.append(MinPLogitsWarper(way.min_p))
    return chain(torch.tensor([prompt + output]), scores.clone()[None])[0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(ways, pasts), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_scores_are_changed_as_transformers_does(
    rows: list[tuple[SamplingParams, tuple[list[int], list[int]]]], seed: int
) -> None:
    scores = torch.randn(len(rows), SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    choices = [SamplerState(way, prompt, list(output)) for way, (prompt, output) in rows]
    expected = torch.stack([reference(row, way, *past) for row, (way, past) in zip(scores, rows, strict=True)])
    found = filter_logits(apply_penalties(scores.clone(), choices, eos_token_ids=[END]), [way for way, _ in rows])
    assert (found.isinf() == expected.isinf()).all()
    assert torch.allclose(found, expected, atol=1e-5)


def test_draws_follow_the_probabilities() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, float("-inf")]])
    choice = SamplerState(SamplingParams(max_tokens=1, temperature=1.0, seed=3), [1])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample_tokens(scores.clone(), [choice])[0]] += 1
    assert torch.allclose(counts / 4000, scores[0].softmax(-1), atol=0.03)
    assert counts[3] == 0


def test_penalties_of_openai_count_the_output_alone() -> None:
    way = SamplingParams(max_tokens=9, presence_penalty=0.5, frequency_penalty=0.25)
    found = apply_penalties(torch.zeros(1, 6), [SamplerState(way, [5, 5], [1, 1, 1, 2])], eos_token_ids=[])
    assert found[0].tolist() == [0, -1.25, -0.75, 0, 0, 0]


def test_logprobs_are_of_unchanged_scores() -> None:
    scores = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    token = make_tokens(scores, [1], [SamplerState(SamplingParams(max_tokens=1, logprobs=2), [0])])[0]
    logs = scores[0].log_softmax(-1)
    assert token.logprob == logs[1]
    assert token.top == ((2, float(logs[2])), (3, float(logs[3])))
