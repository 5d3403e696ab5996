"""Answers hold the text of their tokens, whole or as a stream, whatever the tokenizer makes of bytes and spaces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.inference import EngineLimits
from launcher.inference.engine.echo_engine import EchoEngine
from launcher.inference.tokenizer import TextTokenizer
from tests.inference.kinds import EVERYTHING, EXACT, KINDS
from tests.inference.server.in_process import MODEL, InProcess, in_process

TEXT = "the 😀😀 日本語 😀 there é👩‍🔬 t"


@pytest.fixture(scope="module", params=EXACT)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[InProcess, TextTokenizer]]:
    inner = KINDS[request.param]._inner
    words = TextTokenizer(inner, chat=lambda messages, name: messages[-1]["content"])
    with in_process(
        EchoEngine(limits=EngineLimits(), max_model_len=1024, vocab_size=words.vocab_size), words
    ) as server:
        yield server, words


def complete(server: InProcess, ids: list[int], **more: Any) -> tuple[str, dict[str, Any]]:
    """Return the text of an echo of ``ids``, which must be the same as a stream, and its whole choice."""
    body = {"model": MODEL, "prompt": ids, "temperature": 0, "max_tokens": len(ids), "ignore_eos": True, **more}
    whole, stream = server.post("/v1/completions", body, {**body, "stream": True})
    choice = whole.json()["choices"][0]
    chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    if more.get("logprobs") is not None:
        tokens = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
    return choice["text"], choice


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=EVERYTHING, cut=st.integers(0, 3), extra=st.lists(st.integers(0, 258), max_size=6))
def test_text_is_that_of_the_tokens(
    served: tuple[InProcess, TextTokenizer], text: str, cut: int, extra: list[int]
) -> None:
    server, words = served
    ids = words.encode(text)
    ids = [1, *ids[: len(ids) - cut], *(token % words.vocab_size for token in extra)]
    assert complete(server, ids)[0] == words.decode(ids)
    assert complete(server, ids, echo=True)[0] == words.decode([*ids, *ids])


def test_tokens_with_their_log_probabilities_are_the_text(served: tuple[InProcess, TextTokenizer]) -> None:
    server, words = served
    ids = words.encode(TEXT)
    text, choice = complete(server, ids, logprobs=2)
    assert text == TEXT
    shown = choice["logprobs"]["tokens"]
    raw = b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) if token.startswith("bytes:") else token.encode()
        for token in shown
    )
    assert raw.decode() == TEXT
    offsets = choice["logprobs"]["text_offset"]
    assert [TEXT[at] for at, token in zip(offsets, shown, strict=True) if token == "é"] == ["é"] * shown.count("é")
    chat = {"messages": [{"role": "user", "content": TEXT}], "logprobs": True, "top_logprobs": 1}
    ask = {"model": MODEL, "temperature": 0, "max_tokens": len(words.encode(TEXT, special=False)), **chat}
    (answer,) = server.post("/v1/chat/completions", ask)
    found = answer.json()["choices"][0]
    assert found["message"]["content"] == TEXT
    assert b"".join(bytes(row["bytes"]) for row in found["logprobs"]["content"]).decode() == TEXT


@pytest.mark.parametrize("stop", ["日", "😀 there", "👩", "\u200d🔬", " "])
def test_a_stop_string_is_found_and_not_shown(served: tuple[InProcess, TextTokenizer], stop: str) -> None:
    server, words = served
    text, choice = complete(server, words.encode(TEXT), stop=stop)
    assert (text, choice["finish_reason"]) == (TEXT.partition(stop)[0], "stop")
    echoed, _ = complete(server, words.encode("the"), stop="th", echo=True)
    assert echoed == "the" + ("" if words.decode(words.encode("the") * 2) == "thethe" else " ")
