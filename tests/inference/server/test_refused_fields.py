"""Fields and values of bodies that are refused: each with its name, a code, and a sentence of this server's own."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from launcher.inference.server.protocol import (
    BodyLimits,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    RequestBody,
    TokenizeBody,
)
from launcher.inference.server.requests import parse_body, sampling_params
from launcher.inference.server.responses import ApiError
from tests.inference.server.loop import MODEL, client, post

MESSAGE = {"role": "user", "content": "a"}
CHAT = {"model": MODEL, "messages": [MESSAGE]}
COMPLETION = {"model": MODEL, "prompt": "a"}
OF_VALIDATOR = re.compile(r"Input should|Field required|valid (?:list|string|number|integer|boolean)|should have")
NUMBERS = ["a", True, [], {}, None, 1.5, -1e9, 1e30, 10**400, float("nan"), float("inf")]


def refusal(body_type: type[RequestBody], body: dict[str, Any]) -> ApiError | None:
    limits = BodyLimits(max_model_len=256, max_prompts=64)
    try:
        asyncio.run(parse_body(body_type, json.dumps(body).encode(), limits))
    except ApiError as problem:
        return problem
    return None


def test_null_leaves_out_known_fields_only() -> None:
    of_openai = {"suffix": None, "tools": None, "metadata": None, "store": None, "stream_options": None}
    assert refusal(CompletionBody, {**COMPLETION, **of_openai}) is None
    answered = {**MESSAGE, "refusal": None, "tool_calls": None, "annotations": None, "audio": None}
    assert refusal(ChatBody, {**CHAT, "messages": [answered], "response_format": {"type": "text"}}) is None
    for body_type, body, place in (
        (CompletionBody, {**COMPLETION, "unknown_field": None}, "unknown_field"),
        (CompletionBody, {**COMPLETION, "messages": None}, "messages"),
        (TokenizeBody, {"prompt": "a", "unknown_field": None}, "unknown_field"),
        (DetokenizeBody, {"tokens": [1], "unknown_field": None}, "unknown_field"),
        (ChatBody, {**CHAT, "messages": [{**MESSAGE, "unknown_field": None}]}, "messages.0.unknown_field"),
        (ChatBody, {**CHAT, "stream": True, "stream_options": {"unknown_field": None}}, "stream_options.unknown_field"),
    ):
        problem = refusal(body_type, body)
        assert problem is not None, body
        assert (problem.param, problem.code) == (place, "unsupported_field")


def test_unknown_fields_of_a_part_are_refused_when_they_are_null() -> None:
    def content(**more: Any) -> dict[str, Any]:
        return {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "a", **more}]}]}

    assert refusal(ChatBody, content(image_url=None)) is None
    problem = refusal(ChatBody, content(unknown_field=None))
    assert problem is not None
    assert "'unknown_field'" in problem.message


@pytest.mark.parametrize(
    ("messages", "param", "code", "said"),
    [
        ([], "messages", "invalid_value", "is an empty list; give at least 1"),
        ("a", "messages", "invalid_value", "is 'a'; give a list"),
        ([1], "messages.0", "invalid_value", "is 1; give an object"),
        ([{}], "messages.0.role", "invalid_value", "is missing"),
        ([{"role": "user"}], "messages.0.content", "invalid_value", "is missing"),
        ([{"role": "king", "content": "a"}], "messages.0.role", "invalid_value", "is 'king'; give 'system', "),
        ([{"role": 7, "content": "a"}], "messages.0.role", "invalid_value", "is 7; give 'system', "),
        ([{"role": None, "content": "a"}], "messages.0.role", "invalid_value", "is null"),
        (
            [MESSAGE, {"role": "tool", "content": "a", "tool_call_id": "x"}],
            *("messages.1.role", "unsupported_value", "is 'tool', which this server does not support; give 'system', "),
        ),
        ([{**MESSAGE, "tool_calls": []}], "messages.0.tool_calls", "unsupported_field", "this server does not support"),
        ([MESSAGE] * 2049, "messages", "invalid_value", "has 2,049 elements; at most 2,048 are allowed"),
    ],
    ids=range(11),
)
def test_messages(messages: Any, param: str, code: str, said: str) -> None:
    for body_type, body in ((ChatBody, CHAT), (TokenizeBody, {})):
        problem = refusal(body_type, {**body, "messages": messages})
        assert problem is not None
        assert (problem.param, problem.code) == (param, code)
        assert problem.message.startswith(f"{param}: {said}")


@pytest.mark.parametrize("body_type", [CompletionBody, ChatBody, TokenizeBody, DetokenizeBody])
def test_no_sentence_is_the_validators(body_type: type[RequestBody]) -> None:
    good: dict[type[RequestBody], dict[str, Any]] = {CompletionBody: COMPLETION, ChatBody: CHAT, TokenizeBody: {}}
    body, refused = good.get(body_type, {"tokens": [1]}), 0
    bodies = [{**body, name: value} for name in body_type.model_fields for value in [*NUMBERS, "x" * 300, [7] * 3000]]
    bodies += [{name: body[name] for name in body if name != left_out} for left_out in body]
    bodies += [{**body, name: {"type": kind}} for name in ("response_format", "stream_options") for kind in (1, "json")]
    for each in bodies:
        if (problem := refusal(body_type, each)) is not None:
            refused += 1
            assert problem.param, each
            assert problem.code in ("invalid_value", "unsupported_field", "context_length_exceeded")
            assert not OF_VALIDATOR.search(problem.message), problem.message
    assert refused > 5 * len(body_type.model_fields)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {**COMPLETION, "stop_token_ids": [257]}, "stop_token_ids"),
        ("/v1/completions", {**COMPLETION, "stop_token_ids": [-1]}, "stop_token_ids"),
        ("/v1/completions", {**COMPLETION, "stop_token_ids": [2**31]}, "stop_token_ids"),
        ("/v1/completions", {**COMPLETION, "logit_bias": {"257": 1}}, "logit_bias"),
        ("/v1/completions", {**COMPLETION, "logit_bias": {"-1": 1}}, "logit_bias"),
        ("/v1/completions", {**COMPLETION, "prompt": [257]}, "prompt"),
        ("/v1/completions", {**COMPLETION, "prompt": [[1], [257]]}, "prompt"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
    ],
    ids=range(8),
)
def test_tokens_outside_the_vocabulary_are_refused(path: str, body: Any, param: str) -> None:
    async def ask() -> tuple[int, Any]:
        async with client() as to:
            answer = await post(to, path, body)
            return answer.status_code, answer.json()

    status, answer = asyncio.run(ask())
    assert status == 400, answer
    assert (answer["error"]["param"], answer["error"]["code"]) == (param, "invalid_value")


@pytest.mark.parametrize(
    ("body_type", "body", "param"),
    [
        (ChatBody, {**CHAT, "stream_options": {"include_usage": True}}, "stream_options"),
        (CompletionBody, {**COMPLETION, "stream_options": {"include_usage": True}}, "stream_options"),
        (ChatBody, {**CHAT, "top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_fields_that_need_another_one_are_refused_without_it(
    body_type: type[GenerationBody], body: dict[str, Any], param: str
) -> None:
    def sampled(**more: bool) -> object:
        raw = json.dumps({**body, **more}).encode()
        read = asyncio.run(parse_body(body_type, raw, BodyLimits(max_model_len=256, max_prompts=64)))
        return sampling_params(read, max_tokens=4, vocab_size=300)

    with pytest.raises(ApiError) as problem:
        sampled()
    assert problem.value.param == param
    sampled(**{"logprobs" if param == "top_logprobs" else "stream": True})
