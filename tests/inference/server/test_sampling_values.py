"""No value of a sampling field is the server's fault, or any other request's; one table says which are taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.data.rows import Record
from launcher.config.inference import EngineLimits
from launcher.config.job.generate import Generate
from launcher.config.prompt_file import BadLine
from launcher.config.sampling import RANGES, SamplingParams
from launcher.errors import ConfigErrors
from launcher.inference.batch.requests import parse_request
from launcher.inference.engine.base import EngineRequest, InvalidRequest, check_request
from launcher.inference.engine.paged_engine import PagedEngine
from launcher.inference.tokenizer import byte_tokenizer
from tests.inference.server.in_process import MODEL, InProcess, in_process
from tests.inference.values import FLOATS, INTEGERS, Table, around

WORDS = byte_tokenizer()
_OPTIONS = Generate().default_fields.keys()
CONTROL = {"model": MODEL, "prompt": "abc", "max_tokens": 5, "temperature": 0.9, "seed": 3}
_NUMBERS = st.one_of(FLOATS, INTEGERS)
_SHARED = {
    **dict.fromkeys(["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"], _NUMBERS),
    **dict.fromkeys(["frequency_penalty", "length_penalty", "top_k", "seed", "n", "max_tokens"], _NUMBERS),
    **dict.fromkeys(["min_tokens", "no_repeat_ngram_size", "num_beams", "priority"], _NUMBERS),
    "logit_bias": st.dictionaries(st.one_of(_NUMBERS.map(str), st.integers(0, 300).map(str), st.text()), _NUMBERS),
    "stop_token_ids": st.lists(st.one_of(_NUMBERS, st.integers(0, 300)), max_size=3),
    "ignore_eos": st.booleans(),
    "stream": st.booleans(),
}
_COMPLETION = {**_SHARED, "best_of": _NUMBERS, "logprobs": st.one_of(_NUMBERS, st.integers(0, 5))}
_CHAT = {**_SHARED, "logprobs": st.booleans(), "top_logprobs": _NUMBERS, "max_completion_tokens": _NUMBERS}


def some_of(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sets(st.sampled_from(sorted(fields)), min_size=1, max_size=4)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: fields[name] for name in sorted(chosen)}))


@pytest.fixture(scope="module")
def server() -> Iterator[InProcess]:
    limits = EngineLimits(max_num_seqs=64)
    paged = PagedEngine(
        Table(isolates=True, size=257),
        limits=limits,
        num_blocks=256,
        max_model_len=40,
        vocab_size=257,
        eos_token_ids=(256,),
    )
    with in_process(paged, chat_words()) as begun:
        yield begun


def chat_words() -> Any:
    words = byte_tokenizer()
    return type(words)(words._inner, chat=lambda messages, name=None: messages[-1]["content"], template="last")


@pytest.fixture(scope="module")
def control(server: InProcess) -> Any:
    return server.post("/v1/completions", CONTROL)[0].json()["choices"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_value_is_answered_and_harms_no_other_request(
    path: str, server: InProcess, control: Any, data: st.DataObject
) -> None:
    is_chat = "chat" in path
    ask = {"messages": [{"role": "user", "content": "ab"}]} if is_chat else {"prompt": "ab"}
    body = {"model": MODEL, "max_tokens": 5, **ask, **data.draw(some_of(_CHAT if is_chat else _COMPLETION))}
    (answer,) = server.post(path, json.dumps(body))
    beside, _ = server.post("/v1/completions", CONTROL, CONTROL)
    assert answer.status_code in (200, 400), answer.text
    assert '"server_error"' not in answer.text
    assert beside.json()["choices"] == control


@pytest.mark.parametrize("name", sorted(RANGES))
def test_one_table_says_what_server_files_and_engines_take(server: InProcess, name: str) -> None:
    limits = RANGES[name]
    for value in [*around(limits), limits.default, 5e-324, 1e-300, 1e-45]:
        if isinstance(limits.minimum, int) and not isinstance(value, int):
            continue
        way = {"temperature": 0.0, name: value}
        taken = not limits.validate(value)
        request = EngineRequest(id="a", prompt=(1,), sampling=SamplingParams(**{"max_tokens": 5, **way}))
        assert refused(request) is not taken, value
        assert (bad_line(way) == "") is taken, value
        if name in _OPTIONS:
            assert bad_options(way) == ([] if taken else [f"job.{name}"]), value
        if name in ("seed", "top_k") and value == -1:
            continue  # only the server has a meaning for it
        most = value if name == "min_tokens" and taken else 5
        body = {"model": MODEL, "prompt": "ab", "temperature": 0, "max_tokens": max(1, most)}
        (answer,) = server.post("/v1/completions", {**body, name: value})
        assert (answer.status_code == 200) is taken, answer.text


def refused(request: EngineRequest) -> bool:
    sizes = {"max_model_len": 40, "vocab_size": 257, "num_blocks": 1 << 40, "max_num_seqs": 64}
    try:
        check_request(request, known=(), **sizes)
    except InvalidRequest:
        return True
    return False


def bad_options(way: dict[str, Any]) -> list[str]:
    try:
        Generate(**way)
    except ConfigErrors as bad:
        return [error.option for error in bad.errors]
    return []


def bad_line(way: dict[str, Any]) -> str:
    try:
        parse_request(Record(0, 1, {"prompt": "a", **way}), {"max_tokens": 5}, WORDS, seed=0)
    except BadLine as bad:
        return str(bad)
    return ""


@settings(max_examples=300, deadline=None, derandomize=True)
@given(changes=some_of(dict.fromkeys((*RANGES, "logit_bias", "stop_token_ids", "stop"), _NUMBERS)))
def test_a_line_of_a_file_is_taken_or_refused(changes: dict[str, Any]) -> None:
    bad_line(changes)
