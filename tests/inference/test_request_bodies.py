"""The error for a field that its endpoint does not take: no server is started."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from launcher.inference.server.protocol import BodyLimits, ChatBody, CompletionBody, GenerationBody
from launcher.inference.server.requests import parse_body, sampling_params
from launcher.inference.server.responses import ApiError

COMPLETION: dict[str, Any] = {"model": "m", "prompt": "a"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
HERE, THERE = "/v1/completions", "/v1/chat/completions"


def refusal(body_type: type[GenerationBody], body: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as refused:
        asyncio.run(parse_body(body_type, json.dumps(body).encode(), BodyLimits(max_model_len=64, max_prompts=4)))
    assert refused.value.status == 400
    return refused.value


@pytest.mark.parametrize(
    ("body_type", "body", "param", "said"),
    [
        (CompletionBody, {**COMPLETION, "response_format": {"type": "json_object"}}, "response_format", THERE),
        (CompletionBody, {**COMPLETION, "max_completion_tokens": 3}, "max_completion_tokens", THERE),
        (CompletionBody, {**COMPLETION, "top_logprobs": 3}, "top_logprobs", THERE),
        (CompletionBody, CHAT, "messages", THERE),
        (ChatBody, COMPLETION, "prompt", HERE),
        (ChatBody, {**CHAT, "echo": True}, "echo", HERE),
        (ChatBody, {**CHAT, "best_of": 1}, "best_of", HERE),
    ],
)
def test_a_field_of_the_other_endpoint_names_it(
    body_type: type[GenerationBody], body: dict[str, Any], param: str, said: str
) -> None:
    error = refusal(body_type, body)
    assert (error.param, error.code) == (param, "unsupported_field")
    assert error.message.endswith(f"does not take this field, {said} does")


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("tools", "tools: this server does not support this field of OpenAI's API"),
        ("suffix", "suffix: this server does not support this field of OpenAI's API"),
        ("promt", "promt: this server has no such field"),
    ],
)
def test_a_field_of_no_endpoint(field: str, said: str) -> None:
    assert refusal(CompletionBody, {**COMPLETION, field: []}).message == said
    assert refusal(ChatBody, {**CHAT, field: []}).message == said


def test_logprobs_differ_between_the_endpoints() -> None:
    for body_type, body in ((CompletionBody, {**COMPLETION, "logprobs": True}), (ChatBody, {**CHAT, "logprobs": 3})):
        assert f"; {HERE} takes a number of tokens" in refusal(body_type, body).message
        assert f"; {THERE} takes true or false" in refusal(body_type, body).message


@pytest.mark.parametrize(("fields", "expected"), [({}, 1.0), ({"num_beams": 2}, 0.0), ({"temperature": 0.5}, 0.5)])
def test_without_a_temperature_one_beam_samples_and_several_search(fields: dict[str, Any], expected: float) -> None:
    body = CompletionBody(**COMPLETION, **fields)
    assert sampling_params(body, max_tokens=4, vocab_size=300).temperature == expected
