"""Text as it comes: the pieces are the whole, no character is cut, and nothing of a stop string is shown."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.data.rows import Record
from launcher.config.sampling import SamplingParams
from launcher.inference.batch.requests import GenerationRequest, GenerationResult
from launcher.inference.detokenizer import Detokenizer, StopStringMatcher, TextStream
from launcher.inference.engine.base import EngineOutput, GeneratedToken
from launcher.inference.tokenizer import TextTokenizer
from launcher.models.tokenizer import FastTokenizer
from tests.inference.kinds import EVERYTHING, EXACT, KINDS, WORDS

TEXTS = st.text(alphabet="ab é漢🧪\u0301\n", max_size=60)


@st.composite
def tokens_of_a_kind(draw: st.DrawFn) -> tuple[TextTokenizer, list[int], str | None]:
    """Tokens of any text, or any tokens: bytes that make no character, special ones, many spaces."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    words, text = KINDS[kind], None
    anything = st.integers(0, words.vocab_size - 1)
    few = st.sampled_from([0, 1, words.vocab_size - 1, words.vocab_size - 2, *words.encode(" a")])
    if kind in EXACT and draw(st.booleans()):
        text = draw(EVERYTHING)
        ids = words.encode(text)
        if draw(st.booleans()):
            ids, text = ids[: draw(st.integers(0, len(ids)))], None
    else:
        ids = draw(st.lists(st.one_of(anything, few), max_size=300))
    return words, ids, text


@settings(max_examples=400, deadline=None, derandomize=True)
@given(tokens_of_a_kind(), st.integers(0, 20))
def test_pieces_are_the_text_under_every_kind_of_tokenizer(
    case: tuple[TextTokenizer, list[int], str | None], length: int
) -> None:
    words, ids, text = case
    whole = words.decode(ids)
    tokens = Detokenizer(words.decode)
    assert "".join(tokens.feed(token) for token in ids) + tokens.rest() == whole
    if text is not None:
        assert whole == (text if words is WORDS else text.replace("▁", " "))
    after = TextStream(words.decode, before=ids[:length])  # a prompt that is echoed
    shown = after.opening + "".join(after.feed(token) for token in ids[length:])
    assert shown + after.rest() == whole


@settings(max_examples=150, deadline=None, derandomize=True)
@given(EVERYTHING, st.sampled_from(EXACT), st.integers(0, 3))
def test_a_text_cut_by_the_last_token_keeps_all_whole_characters(text: str, kind: str, cut: int) -> None:
    words = KINDS[kind]
    ids = words.encode(text)
    ids = ids[: len(ids) - cut]
    raw = b"".join(words.bytes_of(token, first=not at) for at, token in enumerate(ids) if not words.is_special(token))
    assert words.decode(ids).replace("\ufffd", "") == raw.decode(errors="ignore").replace("\ufffd", "")
    assert FastTokenizer(inner=words._inner, end_id=None).decode(ids) == words.decode(ids)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(EVERYTHING, st.sampled_from(["llama", "gemma", "metaspace", "byte level"]))
def test_bytes_of_tokens_are_the_text(text: str, kind: str) -> None:
    words = KINDS[kind]
    ids = words.encode(text)
    raw = b"".join(words.bytes_of(token, first=not at) for at, token in enumerate(ids) if not words.is_special(token))
    assert raw.decode() == words.decode(ids)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("stop", ["", "日", "😀 t"])
def test_a_file_of_answers_has_the_text_of_its_tokens(kind: str, stop: str) -> None:
    words, text = KINDS[kind], "the 😀😀 日本語 😀 there é👩‍🔬"
    sampling, stops = SamplingParams(max_tokens=99), (stop,) if stop else ()
    request = GenerationRequest(prompt=(1,), sampling=sampling, stop=stops, adapter="")
    answer = GenerationResult(Record(0, 1, {}), request, words)
    for token in words.encode(text):
        if answer.add_output(EngineOutput(request_id="0", tokens=(GeneratedToken(id=token),))):
            break
    else:
        answer.add_output(EngineOutput(request_id="0", finish_reason="length"))
    assert json.loads(answer.line("length"))["text"] == (text.partition(stop)[0] if stop else text)


def test_a_character_is_shown_with_its_last_byte() -> None:
    words = KINDS["llama"]
    tokens = Detokenizer(words.decode)
    shown = [tokens.feed(token) for token in words.encode("😀漢😀")]
    assert [piece for piece in shown if piece] == ["😀", "漢", "😀"]
    assert shown[-1] == "😀"


def test_special_tokens_leave_the_space_of_the_next_word() -> None:
    words = KINDS["llama"]
    tokens = Detokenizer(words.decode)
    ids = [*words.encode("the"), *[1] * 200, *words.encode("the")]
    assert "".join(map(tokens.feed, ids)) + tokens.rest() == words.decode(ids) == "the the"


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_no_half_character(text: str) -> None:
    tokens = Detokenizer(WORDS.decode)
    assert not any("\ufffd" in tokens.feed(token) for token in WORDS.encode(text))


@pytest.mark.parametrize("before", range(20, 40))
def test_replacement_characters_of_the_text_itself_outlive_the_window(before: int) -> None:
    text = "a" * before + "\ufffd" * 4 + "b"
    ids = list(text.encode())
    tokens = Detokenizer(lambda some: bytes(some).decode(errors="replace"))
    assert "".join(tokens.feed(token) for token in ids) + tokens.rest() == text


def test_bytes_that_are_no_characters_come_out_and_cost_no_more_with_time() -> None:
    lengths: list[int] = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return WORDS.decode(ids)

    tokens = Detokenizer(decode)
    broken = WORDS.encode("é")[1]
    text = "".join(tokens.feed(broken) for _ in range(1000)) + tokens.rest()
    assert text == "\ufffd" * 1000
    assert max(lengths) <= 128


def expected(text: str, strings: list[str]) -> str:
    """Cut at the string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="abc", max_size=40),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(1, 6), min_size=40, max_size=40),
)
def test_stops_cut_at_the_same_place_however_text_comes(text: str, strings: list[str], sizes: list[int]) -> None:
    stops, shown, at = StopStringMatcher(strings), "", 0
    for size in sizes:
        if stops.found is not None or at >= len(text):
            break
        shown += stops.feed(text[at : at + size])
        at += size
        assert expected(text, strings).startswith(shown)  # nothing is shown that is taken back later
    shown += stops.rest()
    assert shown == expected(text, strings)


def test_a_string_may_be_complete_only_with_the_last_bytes() -> None:
    text = TextStream(WORDS.decode, ["b\ufffd"])
    shown = "".join(text.feed(token) for token in WORDS.encode("abé")[:-1])
    assert shown + text.rest() == "a"
    assert text.stopped == "b\ufffd"


def test_before_it_may_stop_nothing_is_looked_for() -> None:
    text = TextStream(WORDS.decode, ["b"])
    assert [text.feed(token, may_stop=at > 1) for at, token in enumerate(WORDS.encode("abab"))] == ["a", "b", "a", ""]
    assert text.stopped == "b"
