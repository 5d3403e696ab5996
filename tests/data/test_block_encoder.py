"""Tokens by a cache of words, and masks by bytes, against the tokenizer's own tokens and offsets."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from launcher.config.data.bpe import train_byte_level_bpe
from launcher.config.data.examples import ExampleEncoder, RenderedExample, TextSegment
from launcher.data import word_cache
from launcher.data.block_encoder import BlockEncoder
from launcher.data.word_cache import WordCache, can_cut

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN2 = LLAMA3.replace("{1,3}", "")
_MARKS = r"\p{Lm}\p{Lo}\p{M}]"
_LOWER = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_MARKS}*[\p{{Ll}}{_MARKS}+"
_UPPER = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_MARKS}+[\p{{Ll}}{_MARKS}*"
GPT4O = rf"{_LOWER}{_CONTRACTION}?|{_UPPER}{_CONTRACTION}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
LETTERS = ["a", "b", "A", "The", " the", "ab ", "é", "e\u0301", "\u0301", "ß", "Ж", "中文", "ǅ", "ª", "한", "ᄒ", "ᅡ"]
SPACES = [" ", " ", "  ", "\n", "\r\n", "\t", "\x85", "\xa0", "\u2003", "\u2028", "\x1c", "\u200b", "\u180e", "\ufeff"]
OTHERS = ["🙂", "👩‍👩‍👧", "'s", "'ll", "'", "12", "345", "٣", "Ⅷ", ".", ",", "!", "/", "-", "<s>", "<|im_end|>", "\0"]
chance = random.Random(0)


def any_text() -> str:
    """Return some words, spaces of every kind and special tokens, one after the other."""
    return "".join(chance.choices([*LETTERS, *SPACES, *SPACES, *OTHERS], k=chance.randint(0, 14)))


CORPUS = [any_text() for _ in range(300)] + ["the a b ab The the thing's"] * 20


def byte_level(*parts: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = train_byte_level_bpe(CORPUS, vocab_size=400)
    tokenizer.add_special_tokens(["<s>", "<|im_end|>"])
    if parts:
        tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(list(parts))
    return tokenizer


def split(pattern: str) -> Tokenizer:
    without_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(pre_tokenizers.Split(Regex(pattern), "isolated"), without_regex)


def smollm2() -> Tokenizer:
    return byte_level(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))


def qwen2() -> Tokenizer:
    tokenizer = split(QWEN2)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def between_special_tokens() -> Tokenizer:
    tokenizer = split(LLAMA3)
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "<|im_end|>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A <|im_end|>", special_tokens=special)
    return tokenizer


def trimmed() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


CACHED: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": byte_level,
    "smollm2": smollm2,
    "llama3": lambda: split(LLAMA3),
    "qwen2": qwen2,
    "gpt4o": lambda: split(GPT4O),
}


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("most_words", [1 << 17, 30])
def test_words_that_came_before_have_the_tokens_that_they_have_in_the_text(
    name: str, most_words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_cache, "_MOST_WORDS", most_words)
    tokenizer = CACHED[name]()
    cache = WordCache(tokenizer)
    for _ in range(20):
        texts = [any_text() for _ in range(40)]
        expected = [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
        assert [ids.tolist() for ids in cache.encode_batch(texts)] == expected


def with_added(token: AddedToken) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([token])
    return tokenizer


def lower_case() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def with_dropout() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.model.dropout = 0.1
    return tokenizer


UNCUT: dict[str, Callable[[], Tokenizer]] = {
    "space before text": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no words": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "another expression": lambda: split(r"\p{L}+ \p{L}+|.|\s"),
    "token takes spaces": lambda: with_added(AddedToken("ab", rstrip=True, normalized=False)),
    "token holds a space": lambda: with_added(AddedToken("b a", normalized=False)),
    "lower case": lower_case,
    "dropout": with_dropout,
    "no BPE": lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
}


@pytest.mark.parametrize("name", UNCUT)
def test_other_tokenizers_encode_whole_texts(name: str) -> None:
    assert not can_cut(UNCUT[name]())


EXACT = {**CACHED, "special": between_special_tokens, "trimmed": trimmed} | {
    name: UNCUT[name] for name in ("space before text", "token takes spaces", "lower case")
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("end", [None, "<|im_end|>"])
def test_tokens_and_masks_are_those_of_offsets(name: str, end: str | None) -> None:
    tokenizer = EXACT[name]()
    end_id = None if end is None else tokenizer.token_to_id(end)
    block_encoder, encoder = BlockEncoder(tokenizer, end_id=end_id), ExampleEncoder(tokenizer, end_id=end_id)
    for number in range(8):
        examples = [any_example() for _ in range(30)]
        block = block_encoder.encode((0, 0, number), examples)
        expected = [encoder.encode(one) for one in examples]
        assert block.lengths.tolist() == [len(one.ids) for one in expected]
        assert block.ids.tolist() == [token for one in expected for token in one.ids]
        assert block.is_trained.tolist() == [int(flag) for one in expected for flag in one.is_trained]


def any_example() -> RenderedExample:
    segments = (TextSegment(any_text(), chance.random() < 0.5) for _ in range(chance.randint(0, 4)))
    return RenderedExample(tuple(segments), has_special_tokens=chance.random() < 0.5)


def test_no_examples_make_an_empty_block() -> None:
    block = BlockEncoder(byte_level(), end_id=0).encode((0, 0, 0), [])
    assert [len(block.ids), len(block.is_trained), len(block.lengths)] == [0, 0, 0]
