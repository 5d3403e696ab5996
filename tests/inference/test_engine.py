"""What goes wrong ends with whom it concerns; queues, deadlines and ways of batching."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from launcher.config.inference import EngineLimits
from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import EngineRequest, InvalidRequest
from launcher.inference.engine.paged_engine import PagedEngine
from launcher.inference.engine.step_plan import StepPlan
from tests.inference.models import CONTEXT, END, VOCABULARY, alone, engine, finish, tokens

PLAIN = EngineRequest(id="a", prompt=(5, 6, 7), sampling=SamplingParams(max_tokens=4))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Echo:
    """Scores that put each token's successor first; token 13 is one that cannot be computed, 14 gives no number."""

    isolates = True

    def __init__(self) -> None:
        self.seen: list[StepPlan] = []

    def run(self, plan: StepPlan) -> torch.Tensor:
        self.seen.append(plan)
        if any(13 in part.tokens for part in plan.segments):
            raise ArithmeticError("unlucky")
        last = [part.tokens[-1] for part in plan.segments if part.needs_logits]
        scores = torch.nn.functional.one_hot(torch.tensor([t + 1 for t in last], dtype=torch.long), VOCABULARY).float()
        scores[[index for index, token in enumerate(last) if token == 14]] = float("nan")
        return scores

    def close(self) -> None:
        pass


def echo(clock: Clock | None = None, **limits: object) -> tuple[PagedEngine, Echo]:
    runner = Echo()
    made = PagedEngine(
        runner,
        limits=EngineLimits(**limits),
        num_blocks=64,
        max_model_len=CONTEXT,
        vocab_size=VOCABULARY,
        eos_token_ids=(END,),
        clock=clock or Clock(),
    )
    return made, runner


def ask(name: str, *prompt: int, **options: object) -> EngineRequest:
    return EngineRequest(id=name, prompt=prompt, sampling=SamplingParams(max_tokens=3), **options)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("prompt", {"prompt": ()}),
        ("prompt", {"prompt": (VOCABULARY,)}),
        ("prompt", {"prompt": (-1,)}),
        ("prompt", {"prompt": (1,) * CONTEXT}),
        ("max_tokens", {"max_tokens": 0}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": -1.0}),
        ("top_p", {"top_p": 0.0}),
        ("top_k", {"top_k": -1}),
        ("min_p", {"min_p": 1.5}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("logit_bias", {"logit_bias": ((VOCABULARY, 1.0),)}),
        ("stop_token_ids", {"stop_token_ids": (-1,)}),
        ("logprobs", {"logprobs": -1}),
        ("seed", {"seed": -1}),
        ("num_beams", {"num_beams": 2, "temperature": 1.0}),
        ("num_beams", {"num_beams": 99}),
    ],
)
def test_what_cannot_be_served_is_refused_and_harms_no_other_request(field: str, changes: dict[str, object]) -> None:
    paged, _ = echo()
    bad = PLAIN
    if "prompt" in changes:
        bad = dataclasses.replace(bad, **changes)
    else:
        bad = dataclasses.replace(bad, sampling=dataclasses.replace(bad.sampling, **changes))
    with pytest.raises(InvalidRequest) as refused:
        paged.add(bad)
    assert refused.value.param == field
    assert tokens(finish(paged, [PLAIN])["a"]) == [8, 9, 10, 11]


def test_an_id_in_use_is_refused() -> None:
    paged, _ = echo()
    paged.add(PLAIN)
    with pytest.raises(InvalidRequest, match="in use"):
        paged.add(PLAIN)


def test_a_step_that_fails_ends_those_alone_whose_tokens_are_to_blame() -> None:
    paged, _ = echo()
    found = finish(paged, [ask("good", 20), ask("raises", 13), ask("no number", 14), ask("later", 12)])
    assert [found[name][-1].finish_reason for name in found] == ["length", "error", "error", "error"]
    assert "unlucky" in found["raises"][-1].error
    assert "finite" in found["no number"][-1].error
    assert tokens(found["good"]) == [21, 22, 23]
    assert tokens(found["later"]) == [13]
    assert tokens(finish(paged, [ask("next", 30)])["next"]) == [31, 32, 33]


def test_deadlines_of_queue_and_whole() -> None:
    clock = Clock()
    paged, _ = echo(clock, max_num_seqs=1)
    for request in (
        EngineRequest(id="runs", prompt=(30,), sampling=SamplingParams(max_tokens=50), deadline_s=5),
        ask("waits", 20, queue_deadline_s=2),
        ask("patient", 20),
    ):
        paged.add(request)
    assert [u.request_id for u in paged.step()] == ["runs"]
    clock.now = 3
    assert {(u.request_id, u.finish_reason) for u in paged.step()} == {("waits", "timeout"), ("runs", None)}
    clock.now = 6
    assert {(u.request_id, u.finish_reason) for u in paged.step()} == {("runs", "timeout"), ("patient", None)}


def test_priorities_and_ageing() -> None:
    clock = Clock()
    paged, _ = echo(clock, max_num_seqs=1, aging_s=10)
    paged.add(ask("old", 20))
    clock.now = 5
    paged.add(ask("urgent", 20, priority=1))
    clock.now = 14
    paged.add(ask("too late to overtake", 20, priority=1))
    order = []
    while not paged.idle:
        order += [update.request_id for update in paged.step() if update.finish_reason]
    assert order == ["urgent", "old", "too late to overtake"]


def test_one_long_prompt_does_not_delay_others() -> None:
    paged, runner = echo(prefill_chunk_size=8, enable_prefix_caching=False)
    paged.add(EngineRequest(id="talks", prompt=(20,), sampling=SamplingParams(max_tokens=30)))
    paged.step()
    paged.add(ask("long", *range(20, 90)))
    for _ in range(9):
        assert "talks" in [update.request_id for update in paged.step()]
    assert max(sum(len(part.tokens) for part in plan.segments) for plan in runner.seen) == 9


def test_batches_of_like_length_compute_less_padding() -> None:
    padding = {}
    for batching in ("static", "dynamic", "continuous"):
        paged, _ = echo(batching=batching, max_batch_size=4, max_wait_s=0, bucket_size=8)
        prompts = [(20,) * (4 if index % 2 else 60) for index in range(8)]
        requests = [ask(str(index), *prompt) for index, prompt in enumerate(prompts)]
        finish(paged, requests)
        padding[batching] = paged.stats().padding_tokens_total
    assert padding == {"static": 2 * 2 * 56, "dynamic": 0, "continuous": 0}


def test_a_batch_waits_for_others_but_not_for_ever() -> None:
    clock = Clock()
    paged, _ = echo(clock, batching="static", max_batch_size=2, max_wait_s=1)
    paged.add(ask("a", 20))
    assert not paged.step()
    clock.now = 1
    assert paged.step()
    paged.add(ask("b", 20))
    paged.add(ask("c", 20))
    assert {update.request_id for update in paged.step()} == {"a"}


def test_a_plan_survives_the_wire() -> None:
    paged, runner = echo()
    finish(paged, [ask("a", *range(20, 80)), ask("b", 9)])
    for plan in runner.seen:
        assert StepPlan.decode(plan.encode()) == plan


def test_warming_up_leaves_no_trace() -> None:
    paged = engine("llama", kv_cache_tokens=512)
    paged.warm_up([(1, 4), (99, 999)])
    assert paged.idle
    stats = paged.stats()
    assert (stats.steps_total, stats.generated_tokens_total, stats.prompt_tokens_total) == (0, 0, 0)
    request = copy.copy(PLAIN)
    assert tokens(finish(paged, [request])["a"]) == alone("llama", PLAIN.prompt, 4)


def test_sampling_that_fails_ends_its_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    paged, _ = echo()
    with monkeypatch.context() as patch:
        patch.setattr("launcher.inference.engine.output_processor.sample_tokens", lambda *_: 1 / 0)
        assert finish(paged, [ask("a", 20)])["a"][-1].error == "ZeroDivisionError: division by zero"
    assert tokens(finish(paged, [ask("b", 20)])["b"]) == [21, 22, 23]
