"""Tokens of words that have come before, for byte-level BPE.

Such a tokenizer cuts a text into words by regular expressions, and then each word into tokens. Where every alternative
of an expression is one of ``_ALTERNATIVES``, no word goes on from a character that is not white space to a space, and
none depends on what follows that space. So the tokens of a text are those of its pieces, cut before such spaces, and
most pieces of a data set come again.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tokenizers

_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_ANY_CONTRACTION = f"(?i:{'|'.join(_CONTRACTIONS)})"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_ALTERNATIVES = frozenset(
    (
        *(*_CONTRACTIONS, _ANY_CONTRACTION),
        *(r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"),
        *(*_CASED, *(f"{cased}{_ANY_CONTRACTION}?" for cased in _CASED)),
        *(r" ?\p{N}+", r"\p{N}", r"\p{N}{1,3}"),
        *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
        *(r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    )
)
"""Those of GPT-2, Llama 3, Qwen 2 to 3.5, SmolLM2, GPT-4o and Mistral's Tekken."""
_MOST_WORDS = 1 << 17
"""About 30 MB."""
_LONGEST_WORD = 40
_TEXTS_AT_ONCE = 32
"""Words of the first of these are not known to the others."""
_USEFUL_SHARE = 2 / 3
"""Of known words; with fewer, whole texts are faster.
A word alone takes three times its time in a text."""


class WordCache:
    """Encodes texts as the tokenizer does, without special tokens around them.

    Args:
        tokenizer: of which :func:`can_cut` is true.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._encode_batch = tokenizer.encode_batch_fast
        self._words: dict[str, bytes] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of each text, uint32."""
        parts = (texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE))
        return [ids for part in parts for ids in self._encode(part)]

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        cut = [text.split(" ") for text in texts]
        known = [self._known(words) for words in cut]
        num_words = sum(map(len, cut))
        if len(self._words) == _MOST_WORDS and sum(map(_num_missing, known)) > (1 - _USEFUL_SHARE) * num_words:
            encodings = self._encode_batch(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, np.uint32) for encoding in encodings]
        self._complete(cut, known)
        return [np.frombuffer(b"".join(tokens), np.uint32) for tokens in known]  # type: ignore[arg-type]

    def _known(self, words: list[str]) -> list[bytes | None]:
        """Return the tokens of the words that are known with the space before them."""
        return [None, *map(self._words.get, words[1:])]

    def _complete(self, cut: list[list[str]], known: list[list[bytes | None]]) -> None:
        """Put the tokens of each unknown piece at its first word."""
        pieces: dict[str, bytes] = {}
        places: list[tuple[list[bytes | None], int, str]] = []
        new: list[str] = []
        for words, tokens in zip(cut, known, strict=True):
            at = 0
            while at < len(words):
                stop = at + 1
                while stop < len(words) and not _is_end(words[stop - 1]):
                    stop += 1
                piece = " ".join(words[at:stop]) if at == 0 else f" {' '.join(words[at:stop])}"
                if at and stop == at + 1 and len(piece) <= _LONGEST_WORD and _is_end(piece):
                    new.append(piece)
                pieces[piece] = b""
                places.append((tokens, at, piece))
                tokens[at + 1 : stop] = [b""] * (stop - at - 1)
                at = tokens.index(None, stop) if None in tokens[stop:] else len(words)
        encodings = self._encode_batch(list(pieces), add_special_tokens=False)
        for piece, encoding in zip(pieces, encodings, strict=True):
            pieces[piece] = array("I", encoding.ids).tobytes()
        for tokens, at, piece in places:
            tokens[at] = pieces[piece]
        for piece in new[: _MOST_WORDS - len(self._words)]:
            self._words[piece[1:]] = pieces[piece]


def _num_missing(tokens: list[bytes | None]) -> int:
    return tokens.count(None)


def _is_end(word: str) -> bool:
    """Return whether a text can be cut after a word: its last character is no white space."""
    return word != "" and (word[-1].isalnum() or "!" <= word[-1] <= "~")


def can_cut(tokenizer: tokenizers.Tokenizer) -> bool:
    """Return whether a text's tokens are those of its pieces.

    They are cut before spaces that follow other characters.
    """
    from tokenizers import models, normalizers

    model, normalizer = tokenizer.model, tokenizer.normalizer
    if not isinstance(model, models.BPE) or model.dropout or not isinstance(normalizer, normalizers.NFC | None):
        return False
    parts = _parts(tokenizer.pre_tokenizer)
    cuts = any(part["type"] == "Split" or (part["type"] == "ByteLevel" and part["use_regex"]) for part in parts)
    added = tokenizer.get_added_tokens_decoder().values()
    return cuts and all(map(_keeps_pieces, parts)) and all(map(_is_in_piece, added))


def _parts(pre_tokenizer: Any) -> list[Any]:
    if pre_tokenizer is None:
        return []
    tree = json.loads(pre_tokenizer.__getstate__())
    return list(tree["pretokenizers"]) if tree["type"] == "Sequence" else [tree]


def _keeps_pieces(part: Any) -> bool:
    """Return whether a pre-tokenizer cuts the pieces of a text as it cuts the text."""
    if part["type"] == "ByteLevel":
        return not part["add_prefix_space"]
    if part["type"] == "Split":
        behavior = (part["behavior"], part["invert"])
        pattern = part["pattern"].get("Regex", "")
        return behavior in (("Isolated", False), ("Removed", True)) and _ALTERNATIVES.issuperset(_split(pattern))
    return bool(part["type"] == "Digits")


def _split(pattern: str) -> list[str]:
    """Return the alternatives of a regular expression."""
    found, depth = [""], 0
    for character in pattern:
        depth += (character in "([") - (character in ")]")
        if character == "|" and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return found


def _is_in_piece(token: tokenizers.AddedToken) -> bool:
    """Return whether an added token is found in a piece as in the text."""
    takes_more = token.lstrip or token.rstrip or token.single_word
    return not takes_more and " " not in token.content and (token.content.isascii() or not token.normalized)
