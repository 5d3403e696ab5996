"""Whole texts as evaluation windows, and the bytes of text that tokens stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from launcher.config.data.auto import AutoData
from launcher.config.data.base import Corpus
from launcher.config.data.bpe import train_byte_level_bpe
from launcher.config.data.text import Text
from launcher.config.model.gpt2 import Gpt2
from launcher.data import evaluation
from launcher.data.dataset import TokenStream
from launcher.data.evaluation import EvalSet, TextWindows, open_eval_sets, token_bytes
from launcher.data.rows import IGNORE_INDEX
from launcher.data.token_cache import token_folder
from launcher.errors import ConfigError
from launcher.models.tokenizer import FastTokenizer


@pytest.mark.parametrize("stride", [8, 3, 1])
@pytest.mark.parametrize("prefix", [None, 99])
@pytest.mark.parametrize("size", [2, 7, 8, 9, 16, 25])
def test_every_token_is_predicted_once_from_the_tokens_before_it(size: int, prefix: int | None, stride: int) -> None:
    text = np.arange(size)
    rows = TextWindows(stream=TokenStream([text[:5], text[5:]]), prefix=prefix, length=8, stride=stride)
    predicted = []
    for index in range(rows.num_sequences):
        row = rows.row(index)
        inputs, labels = row.input_ids, row.labels
        assert len(inputs) == len(labels) == rows.num_tokens(index) <= 8
        assert (labels != IGNORE_INDEX).sum() == rows.num_labels(index) > 0
        for at in np.flatnonzero(labels != IGNORE_INDEX):
            label = int(labels[at])
            context = [*([prefix] if prefix is not None else []), *range(label)][-(at + 1) :]
            assert inputs[: at + 1].tolist() == context
            assert index == 0 or at >= 8 - stride
            predicted.append(label)
    assert predicted == list(range(0 if prefix is not None else 1, size))
    assert rows.num_counted == len(predicted)


TEXTS = ("Zażółć gęślą jaźń — plain words, 123.", "日本語のテキスト", "a", "emoji 🙂 and\ttabs")


def test_the_bytes_of_byte_level_tokens_are_those_of_the_text() -> None:
    inner = train_byte_level_bpe(TEXTS, vocab_size=300)
    inner.add_special_tokens(["<|end|>"])
    tokenizer = FastTokenizer(inner=inner, end_id=inner.token_to_id("<|end|>"))
    sizes = token_bytes(tokenizer)
    for text in (*TEXTS, "unseen: ǅ and 𝄞"):
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    assert sizes[tokenizer.end_id] == 0


def test_the_bytes_of_words_with_a_space_and_of_single_bytes_are_those_of_the_text() -> None:
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for token in ("▁", "a", "b", "c", "ż", "▁a", "▁ab", "ab"):
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab")]
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()]
    )
    tokenizer = FastTokenizer(inner=inner, end_id=None)
    sizes = token_bytes(tokenizer)
    for text in ("ab a żab", "abc 🙂 ab", " a"):
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


def opened_sets(data: Corpus, model: Gpt2, tokenizer: FastTokenizer, **paths: str) -> list[EvalSet]:
    return open_eval_sets(data, model, paths, tokenizer=tokenizer, length=8, stride=8, heartbeat=lambda: None)


def test_a_set_is_tokenised_as_the_runs_data_and_one_that_is_empty_or_of_chats_is_refused(
    text: Callable[..., Text], model: Gpt2, tmp_path: Path
) -> None:
    data, others = text(), tmp_path / "others"
    tokenizer = token_folder(data, model, heartbeat=lambda: None)[1]
    others.mkdir()
    (others / "a.txt").write_text("Line 3 of another text")
    (found,) = opened_sets(data, model, tokenizer, code=str(others / "a.txt"))
    windows = found.windows
    read = [token for index in range(windows.num_sequences) for token in windows.row(index).labels]
    assert (found.name, read) == ("code", [*tokenizer.encode("Line 3 of another text"), tokenizer.end_id])
    (others / "none.txt").write_text("")
    with pytest.raises(ConfigError, match=r"none\.txt"):
        opened_sets(data, model, tokenizer, code=str(others / "none.txt"))
    (others / "chats.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    chats = AutoData(path=str(tmp_path), chat_template="none", cache=data.cache)
    with pytest.raises(ConfigError, match=r"job\.eval_sets\.code=.*holds examples, and windows are cut from text"):
        opened_sets(chats, model, tokenizer, code=str(others / "chats.jsonl"))


def test_a_text_without_a_token_to_predict_is_refused(
    text: Callable[..., Text], model: Gpt2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an end token nothing comes before the only one of this text."""
    data = text()
    tokenizer = FastTokenizer(inner=token_folder(data, model, heartbeat=lambda: None)[1].inner, end_id=None)
    monkeypatch.setattr(evaluation, "token_folder", lambda *_, **__: (tmp_path, tokenizer))
    monkeypatch.setattr(evaluation, "open_stream", lambda folder: TokenStream([np.arange(1)]))
    with pytest.raises(ConfigError, match=r"job\.eval_sets\.code=a\.txt: has no token to predict; give more text"):
        opened_sets(data, model, tokenizer, code="a.txt")
