"""Bodies that are wrong, large or both: one message each that names the field, and no work that others wait for."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from bodies import large_bodies

from launcher.inference.server.protocol import (
    BodyLimits,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    RequestBody,
    TokenizeBody,
)
from launcher.inference.server.requests import encode_json, parse_body
from launcher.inference.server.responses import ApiError
from launcher.inference.tokenizer import TextTokenizer, byte_tokenizer
from tests.inference.server.loop import MODEL, client, post

BOUNDS = BodyLimits(max_model_len=256, max_prompts=64)
MESSAGES = [{"role": "user", "content": "a"}]
GOOD: dict[type[RequestBody], dict[str, Any]] = {
    CompletionBody: {"model": MODEL, "prompt": "a"},
    ChatBody: {"model": MODEL, "messages": MESSAGES},
    TokenizeBody: {"prompt": "a"},
    DetokenizeBody: {"tokens": [1]},
}
WEIRD = [
    *("", "text", "\0", 0, -1, 1.5, True, False, 5e-324, 10**30, 10**400, -(2**63), [], [[]], [[[]]], {}, {"": None}),
    *([""], [-1], [True], [None], [1, "a"], ["a", 1], [1.0], [[1], "a"], [{}], [[1], []], [[1], [None]], ["a"] * 100),
    *([1] * 300, [[1]] * 65, {"type": "text"}, [{"type": "text"}], [{"role": "user"}], {"a": "b"}, {"1": True}),
    *([{"role": "user", "content": value}] for value in (None, 1, [], [1], [{}], [{"type": "image"}], {"a": 1})),
]
INTERNALS = re.compile(
    r"constrained|function-|tagged|union|pydantic|\[key\]|list\[|nullable|after validation", re.IGNORECASE
)


def problem_of(body_type: type[RequestBody], body: Any) -> ApiError | None:
    """Return why a body is refused, ``None`` where it is taken."""
    try:
        asyncio.run(parse_body(body_type, body if isinstance(body, bytes) else json.dumps(body).encode(), BOUNDS))
    except ApiError as problem:
        return problem
    return None


@pytest.mark.parametrize("body_type", GOOD, ids=lambda each: each.__name__)
def test_errors_name_the_field_and_nothing_of_the_validator(body_type: type[RequestBody]) -> None:
    assert problem_of(body_type, GOOD[body_type]) is None
    refused = 0
    for name in [*body_type.model_fields, "unknown"]:
        for value in WEIRD:
            problem = problem_of(body_type, {**GOOD[body_type], name: value})
            if problem is not None:
                refused += 1
                assert problem.status == 400
                assert (problem.param or "").split(".")[0] == name, (value, problem.message)
                assert problem.message.startswith(f"{problem.param}: ")
                assert not INTERNALS.search(f"{problem.param} {problem.message}"), problem.message
                assert len(problem.message) < 300
    assert refused > 10 * len(body_type.model_fields)


@pytest.mark.parametrize("prompt", [[], [-1], [True], {}, 7, [[]], ["a", 1], [1, "a"], [1.5], [None]])
def test_a_prompt_that_is_none_is_answered_with_what_one_is(prompt: Any) -> None:
    problem = problem_of(CompletionBody, {"model": MODEL, "prompt": prompt})
    assert problem is not None
    assert problem.param == "prompt"
    assert "text, token numbers, or a list of either" in problem.message


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], ["a"] * 17, "a" * 257, 7, [7]])
def test_the_field_of_a_stop_string_is_stop(stop: Any) -> None:
    problem = problem_of(CompletionBody, {**GOOD[CompletionBody], "stop": stop})
    assert problem is not None
    assert problem.param == "stop"


def test_content_that_is_null_is_said_to_be_null() -> None:
    problem = problem_of(ChatBody, {"model": MODEL, "messages": [*MESSAGES, {"role": "user", "content": None}]})
    assert problem is not None
    assert problem.param == "messages.1.content"
    assert "is null" in problem.message


def test_large_bodies_are_answered() -> None:
    """How long each holds the event loop is measured by scripts/bench/fuzz_bodies.py."""
    statuses: dict[str, tuple[int, int]] = {}

    async def ask_all() -> None:
        async with client(max_model_len=4096) as to:
            for name, (path, body, status) in large_bodies(MODEL).items():
                statuses[name] = status, (await post(to, path, body)).status_code

    asyncio.run(ask_all())
    assert {name: pair for name, pair in statuses.items() if pair[0] != pair[1]} == {}


def test_large_bodies_that_come_together_are_parsed_in_turn() -> None:
    """Each in another round of the event loop, which answers other requests in between."""
    content, rounds = json.dumps({"tokens": [1] * 60_000}).encode(), 0

    async def go_round() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    async def round_of_one() -> int:
        await parse_body(DetokenizeBody, content, BOUNDS)
        return rounds

    async def all_at_once() -> list[int]:
        going = asyncio.create_task(go_round())
        found = await asyncio.gather(*(round_of_one() for _ in range(10)))
        going.cancel()
        return found

    found = asyncio.run(all_at_once())
    assert len(set(found)) == 10, found


@pytest.mark.parametrize(
    "work",
    [lambda words: words.encode_all(["a b" * 80_000]), lambda words: words.decode([97] * 400_000)],
    ids=["tokenising", "detokenising"],
)
def test_other_threads_run_meanwhile(work: Callable[[TextTokenizer], Any]) -> None:
    """The event loop is another thread, and gets nowhere where a library keeps the interpreter's lock."""
    words, turns, ended = byte_tokenizer(), 0, threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: (work(words), ended.set()))
        while not ended.wait(0.001):
            turns += 1
        running.result()
    assert turns > 10


def test_long_prompts_are_decoded_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """For an echo, and once for each choice: together they would hold the loop for the sum of their times."""
    decoded: dict[str, int] = Counter()
    decode = TextTokenizer.decode

    def decode_where(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
        if len(ids) > 3000:
            decoded[threading.current_thread().name.partition("_")[0]] += 1
        return decode(tokenizer, ids)

    async def ask() -> None:
        body = {"model": MODEL, "prompt": "a" * 4000, "n": 3, "max_tokens": 1, "echo": True}
        async with client(max_model_len=4096) as to:
            assert (await post(to, "/v1/completions", body)).status_code == 200

    monkeypatch.setattr(TextTokenizer, "decode", decode_where)
    asyncio.run(ask())
    assert decoded == {"tokenize": 3}


_DEEP = {"a": {"b": {"c": {"d": [{"e": [1] * 200}] * 70}}}}


@pytest.mark.parametrize("value", [{}, [], {"a": []}, list(range(300)), _DEEP, ['é\n"', None, 1.5, True]], ids=range(6))
def test_json_in_slices_is_json(value: Any) -> None:
    assert json.loads(asyncio.run(encode_json(value))) == value
