"""Whatever values a request has, it is refused or ends by itself: the requests beside it never notice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.serving import engine as engine_module
from launcher.serving.base import Generator
from launcher.serving.drive import drive
from launcher.serving.echo import Echo
from launcher.serving.engine import Slots
from launcher.serving.limits import Limits
from launcher.serving.link import EngineLink
from launcher.serving.values import Refused, Request, Sampling

from .models import finish, tokens
from .values import FLOATS, INTEGERS, VOCABULARY, Table

CONTEXT, END = 40, 3
CONTROLS = (
    Request(id="greedy", prompt=(5, 6, 7), sampling=Sampling(max_tokens=6, ignore_end=True, logprobs=2)),
    Request(id="seeded", prompt=(8, 9), sampling=Sampling(max_tokens=6, ignore_end=True, temperature=1.0, seed=4)),
)


@cache
def of_kind(kind: str) -> Generator:
    limits = Limits(max_requests=8)
    if kind == "echo":
        return Echo(limits=limits, context=CONTEXT, vocab_size=VOCABULARY, ends=(END,))
    runner = Table(isolates=kind == "alone")  # ranks in lockstep end where a step fails
    return Slots(runner, limits=limits, num_pages=64, context=CONTEXT, vocab_size=VOCABULARY, ends=(END,))


@cache
def expected(kind: str) -> dict[str, list[int]]:
    return {name: tokens(updates) for name, updates in finish(of_kind(kind), CONTROLS).items()}


def refused_field(engine: Generator, request: Request) -> str | None:
    try:
        engine.add(request)
    except Refused as refusal:
        return refusal.field
    engine.cancel(request.id)
    engine.step()
    return None


_IDS = st.one_of(st.integers(0, VOCABULARY - 1), INTEGERS)
FIELDS = {
    **dict.fromkeys(["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"], FLOATS),
    **dict.fromkeys(["frequency_penalty", "length_penalty"], FLOATS),
    **dict.fromkeys(["max_tokens", "min_tokens", "top_k", "no_repeat_ngram", "beams"], INTEGERS),
    **dict.fromkeys(["seed", "logprobs"], st.one_of(st.none(), INTEGERS)),
    "bias": st.lists(st.tuples(_IDS, FLOATS), max_size=4).map(tuple),
    "stop_ids": st.lists(_IDS, max_size=4).map(tuple),
    "ignore_end": st.booleans(),
}
WAYS = st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none(), min_size=1, max_size=4).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)


def test_the_strategy_knows_every_field() -> None:
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(Sampling)}


@pytest.mark.parametrize("kind", ["alone", "lockstep", "echo"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(changes=WAYS, temperature=st.sampled_from([0.0, 0.7]))
def test_any_value_is_refused_or_served(kind: str, changes: dict[str, object], temperature: float) -> None:
    engine, way = of_kind(kind), Sampling(**{"max_tokens": 5, "temperature": temperature, **changes})
    bad = Request(id="bad", prompt=(1, 2, 1, 2), sampling=way)
    asked = [CONTROLS[0], bad, CONTROLS[1]]
    if (refused := refused_field(engine, bad)) is not None:
        assert refused in changes
        asked.remove(bad)
    found = finish(engine, asked)
    assert {name: tokens(found[name]) for name in expected(kind)} == expected(kind)
    if bad in asked:
        last = found["bad"][-1]
        assert last.finish in ("stop", "length") or last.field in changes
        assert all(0 <= token < VOCABULARY for token in tokens(found["bad"]))
        shown = [token for update in found["bad"] for token in update.tokens if token.logprob is not None]
        assert all(math.isfinite(score) for token in shown for score in (token.logprob, *dict(token.top).values()))


@pytest.mark.parametrize("kind", ["alone", "lockstep"])
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=WAYS, temperature=st.sampled_from([0.0, 0.7]))
def test_what_no_check_has_kept_out_ends_alone(
    kind: str, changes: dict[str, object], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "check", lambda *arguments, **sizes: None)
    way = Sampling(**{"max_tokens": 5, "temperature": temperature, **changes})
    way = dataclasses.replace(way, beams=min(8, max(1, way.beams)))  # rows to schedule, not scores
    bad = Request(id="bad", prompt=(1, 2, 1, 2), sampling=way)
    found = finish(of_kind(kind), [CONTROLS[0], bad, CONTROLS[1]])
    assert {name: tokens(found[name]) for name in expected(kind)} == expected(kind)


def test_a_request_that_rules_every_token_out_is_the_one_to_blame() -> None:
    way = Sampling(max_tokens=30, ignore_end=True, no_repeat_ngram=1, temperature=1.0, seed=1)
    slots = Slots(Table(isolates=True), limits=Limits(), num_pages=64, context=200, vocab_size=VOCABULARY, ends=(END,))
    asked = [Request(id="bad", prompt=tuple(range(VOCABULARY - 2)), sampling=way), *CONTROLS]
    for beams in (1, 3):
        asked[0] = dataclasses.replace(asked[0], sampling=dataclasses.replace(way, beams=beams, temperature=0.0))
        found = finish(slots, asked)
        assert {name: tokens(found[name]) for name in expected("alone")} == expected("alone")
        assert (found["bad"][-1].finish, found["bad"][-1].field) == ("error", "no_repeat_ngram")


def test_an_error_on_the_way_in_is_the_requests_own() -> None:
    class Breaks(Echo):
        def add(self, request: Request) -> None:
            if request.id == "bad":
                raise ArithmeticError("unlucky")
            super().add(request)

    sent: list[dict[str, object]] = []

    class Link(EngineLink):
        def __init__(self) -> None:
            self._rounds = self._said()

        def _said(self) -> Iterator[list[dict[str, object]]]:
            from launcher.serving.frames import request_to_wire

            yield [
                {"kind": "add", "request": request_to_wire(dataclasses.replace(CONTROLS[0], id=name))}
                for name in ("bad", "good")
            ]
            yield from ([] for _ in range(10))
            yield [{"kind": "end"}]

        def send(self, message: dict[str, object]) -> None:
            sent.append(message)

        def receive(self, *, wait_s: float) -> list[dict[str, object]]:
            return next(self._rounds)

    drive(Breaks(limits=Limits(), context=CONTEXT, vocab_size=VOCABULARY), Link(), beat=lambda phase: None)
    rows = [row for message in sent if message["kind"] == "step" for row in message["updates"]]
    ends = {row[0]: (row[2], row[3]) for row in rows if row[2]}
    assert ends == {"bad": ("error", "ArithmeticError: unlucky"), "good": ("length", "")}
