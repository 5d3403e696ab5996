"""Whatever values a request has, it is rejected or ends on its own: the requests beside it are not affected."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.config.inference import EngineLimits
from launcher.config.sampling import SamplingParams
from launcher.inference.engine import base as engine_module
from launcher.inference.engine.base import EngineRequest, InferenceEngine, InvalidRequest
from launcher.inference.engine.echo_engine import EchoEngine
from launcher.inference.engine.loop import (
    LENGTH_PREFIX,
    AddRequest,
    EngineConnection,
    EngineMessage,
    Shutdown,
    StepOutputs,
    pack_message,
    run_engine_loop,
    unpack_message,
)
from launcher.inference.engine.paged_engine import PagedEngine
from tests.inference.models import finish, tokens
from tests.inference.values import FLOATS, INTEGERS, VOCABULARY, Table

CONTEXT, END = 40, 3
CONTROLS = (
    EngineRequest(id="greedy", prompt=(5, 6, 7), sampling=SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2)),
    EngineRequest(
        id="seeded", prompt=(8, 9), sampling=SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.0, seed=4)
    ),
)


@cache
def of_kind(kind: str) -> InferenceEngine:
    limits = EngineLimits(max_num_seqs=8)
    if kind == "echo":
        return EchoEngine(limits=limits, max_model_len=CONTEXT, vocab_size=VOCABULARY, eos_token_ids=(END,))
    runner = Table(isolates=kind == "alone")  # ranks that share a plan end where a step fails
    return PagedEngine(
        runner, limits=limits, num_blocks=64, max_model_len=CONTEXT, vocab_size=VOCABULARY, eos_token_ids=(END,)
    )


@cache
def expected(kind: str) -> dict[str, list[int]]:
    return {name: tokens(updates) for name, updates in finish(of_kind(kind), CONTROLS).items()}


def refused_field(engine: InferenceEngine, request: EngineRequest) -> str | None:
    try:
        engine.add(request)
    except InvalidRequest as refusal:
        return refusal.param
    engine.cancel(request.id)
    engine.step()
    return None


_IDS = st.one_of(st.integers(0, VOCABULARY - 1), INTEGERS)
FIELDS = {
    **dict.fromkeys(["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"], FLOATS),
    **dict.fromkeys(["frequency_penalty", "length_penalty"], FLOATS),
    **dict.fromkeys(["max_tokens", "min_tokens", "top_k", "no_repeat_ngram_size", "num_beams"], INTEGERS),
    **dict.fromkeys(["seed", "logprobs"], st.one_of(st.none(), INTEGERS)),
    "logit_bias": st.lists(st.tuples(_IDS, FLOATS), max_size=4).map(tuple),
    "stop_token_ids": st.lists(_IDS, max_size=4).map(tuple),
    "ignore_eos": st.booleans(),
}
WAYS = st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none(), min_size=1, max_size=4).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)


def test_the_strategy_knows_every_field() -> None:
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("kind", ["alone", "broadcast", "echo"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(changes=WAYS, temperature=st.sampled_from([0.0, 0.7]))
def test_any_value_is_refused_or_served(kind: str, changes: dict[str, object], temperature: float) -> None:
    engine, way = of_kind(kind), SamplingParams(**{"max_tokens": 5, "temperature": temperature, **changes})
    bad = EngineRequest(id="bad", prompt=(1, 2, 1, 2), sampling=way)
    asked = [CONTROLS[0], bad, CONTROLS[1]]
    if (refused := refused_field(engine, bad)) is not None:
        assert refused in changes
        asked.remove(bad)
    found = finish(engine, asked)
    assert {name: tokens(found[name]) for name in expected(kind)} == expected(kind)
    if bad in asked:
        last = found["bad"][-1]
        assert last.finish_reason in ("stop", "length") or last.param in changes
        assert all(0 <= token < VOCABULARY for token in tokens(found["bad"]))
        shown = [token for update in found["bad"] for token in update.tokens if token.logprob is not None]
        assert all(math.isfinite(score) for token in shown for score in (token.logprob, *dict(token.top).values()))


@pytest.mark.parametrize("kind", ["alone", "broadcast"])
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=WAYS, temperature=st.sampled_from([0.0, 0.7]))
def test_what_no_check_has_kept_out_ends_alone(
    kind: str, changes: dict[str, object], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "check_request", lambda *arguments, **sizes: None)
    way = SamplingParams(**{"max_tokens": 5, "temperature": temperature, **changes})
    way = dataclasses.replace(way, num_beams=min(8, max(1, way.num_beams)))  # rows to schedule, not scores
    bad = EngineRequest(id="bad", prompt=(1, 2, 1, 2), sampling=way)
    found = finish(of_kind(kind), [CONTROLS[0], bad, CONTROLS[1]])
    assert {name: tokens(found[name]) for name in expected(kind)} == expected(kind)


def test_a_request_that_rules_every_token_out_is_the_one_to_blame() -> None:
    way = SamplingParams(max_tokens=30, ignore_eos=True, no_repeat_ngram_size=1, temperature=1.0, seed=1)
    paged = PagedEngine(
        Table(isolates=True),
        limits=EngineLimits(),
        num_blocks=64,
        max_model_len=200,
        vocab_size=VOCABULARY,
        eos_token_ids=(END,),
    )
    asked = [EngineRequest(id="bad", prompt=tuple(range(VOCABULARY - 2)), sampling=way), *CONTROLS]
    for beams in (1, 3):
        asked[0] = dataclasses.replace(asked[0], sampling=dataclasses.replace(way, num_beams=beams, temperature=0.0))
        found = finish(paged, asked)
        assert {name: tokens(found[name]) for name in expected("alone")} == expected("alone")
        assert (found["bad"][-1].finish_reason, found["bad"][-1].param) == ("error", "no_repeat_ngram_size")


def test_an_error_on_the_way_in_is_the_requests_own() -> None:
    class Breaks(EchoEngine):
        def add(self, request: EngineRequest) -> None:
            if request.id == "bad":
                raise ArithmeticError("unlucky \udcff")
            super().add(request)

    sent: list[EngineMessage] = []

    class Link(EngineConnection):
        def __init__(self) -> None:
            self._rounds = self._said()

        def _said(self) -> Iterator[list[EngineMessage]]:
            yield [AddRequest(request=dataclasses.replace(CONTROLS[0], id=name)) for name in ("bad", "good")]
            yield from ([] for _ in range(10))
            yield [Shutdown()]

        def send(self, message: EngineMessage) -> None:
            sent.append(unpack_message(pack_message(message)[LENGTH_PREFIX.size :]))

        def receive(self, *, wait_s: float) -> list[EngineMessage]:
            return next(self._rounds)

    run_engine_loop(
        Breaks(limits=EngineLimits(), max_model_len=CONTEXT, vocab_size=VOCABULARY),
        Link(),
        heartbeat=lambda phase: None,
    )
    outputs = [output for message in sent if isinstance(message, StepOutputs) for output in message.outputs]
    ends = {output.request_id: (output.finish_reason, output.error) for output in outputs if output.finish_reason}
    assert ends == {"bad": ("error", "ArithmeticError: unlucky \ufffd"), "good": ("length", "")}
