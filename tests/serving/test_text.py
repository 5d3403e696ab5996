"""Text as it comes: the pieces are the whole, no character is cut, and nothing of a stop string is shown."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.serving.text import Detokenizer, Stops, TextOf
from launcher.serving.words import byte_words

WORDS = byte_words()
TEXTS = st.text(alphabet="ab é漢🧪\u0301\n", max_size=60)
IDS = st.one_of(TEXTS.map(WORDS.encode), st.lists(st.integers(0, 256), max_size=300))


@settings(max_examples=150, deadline=None)
@given(IDS)
def test_pieces_are_the_text(ids: list[int]) -> None:
    tokens = Detokenizer(WORDS.decode)
    pieces = [tokens.feed(token) for token in ids]
    assert "".join(pieces) + tokens.rest() == WORDS.decode(ids)


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_no_half_character(text: str) -> None:
    tokens = Detokenizer(WORDS.decode)
    assert not any("\ufffd" in tokens.feed(token) for token in WORDS.encode(text))


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
    stops, shown, at = Stops(strings), "", 0
    for size in sizes:
        if stops.found is not None or at >= len(text):
            break
        shown += stops.feed(text[at : at + size])
        at += size
        assert expected(text, strings).startswith(shown)  # nothing is shown that is taken back later
    shown += stops.rest()
    assert shown == expected(text, strings)


def test_a_string_may_be_complete_only_with_the_last_bytes() -> None:
    text = TextOf(WORDS.decode, ["b\ufffd"])
    shown = "".join(text.feed(token) for token in WORDS.encode("abé")[:-1])
    assert shown + text.rest() == "a"
    assert text.stopped == "b\ufffd"


def test_before_it_may_stop_nothing_is_looked_for() -> None:
    text = TextOf(WORDS.decode, ["b"])
    assert [text.feed(token, may_stop=at > 1) for at, token in enumerate(WORDS.encode("abab"))] == ["a", "b", "a", ""]
    assert text.stopped == "b"
