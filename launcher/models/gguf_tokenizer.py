"""Tokenizers in GGUF files: byte-level BPE, to and from ``tokenizer.json``.

A file has the vocabulary and the merges as lists, and the name of the rule by which llama.cpp cuts text into words.
llama.cpp's own converter finds that name by a hash of the tokens of one text, which only vocabularies in its list have.
Here it follows from the rule itself, so it is found for a tokenizer that a run has trained, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_BAD_INPUT, JobError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens in ``tokenizer.ggml.token_type``."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_WORDS_OF_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_RULES: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _WORDS_OF_LLAMA_3}, "behavior": "Isolated", "invert": False},
        {**_BYTES, "use_regex": False},
    ],
}
"""Rules that cut text into words, in ``tokenizer.json``, by llama.cpp's names."""
_WHOLE_WORDS_FIRST = ("llama-bpe",)
"""Rules with which llama.cpp takes a word that is a token without merging."""


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """The fields ``tokenizer.ggml.*`` of a file, and the files of the tokenizer itself."""

    tokens: list[str]
    """Text of each token, in the alphabet of bytes."""
    kinds: list[int]
    merges: list[str]
    rule: str
    """How text is cut into words."""
    special: dict[str, int]
    """Token ids by the names of tokenizer_config.json: ``bos_token``, ``eos_token``, …"""
    add_bos: bool
    """Whether a text begins with ``bos_token``."""
    chat_template: str | None
    json: str
    """``tokenizer.json``."""


def read_tokenizer(folder: Path, *, num_rows: int) -> GgufTokenizer:
    """Return the tokenizer of a model folder.

    Args:
        folder: with ``tokenizer.json``.
        num_rows: of the model's embedding; rows without a token get one that is never used.

    Raises:
        JobError: llama.cpp has no such tokenizer; the message names the part.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise _refusal(folder, "has no tokenizer.json")
    text = file.read_text(encoding="utf-8")
    tree = json.loads(text)
    model = tree["model"]
    rule = _rule_of(tree, folder)
    vocabulary: dict[int, str] = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(vocabulary, NORMAL)
    for added in tree.get("added_tokens") or []:
        if any(added.get(key) for key in ("single_word", "lstrip", "rstrip")):
            raise _refusal(folder, f"its token {added['content']!r} takes spaces beside it")
        vocabulary[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if len(vocabulary) > num_rows or max(vocabulary) >= num_rows:
        raise _refusal(folder, f"it has {max(vocabulary) + 1} tokens, and the model {num_rows} rows")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    special = _special_tokens(folder, {token: number for number, token in vocabulary.items()})
    return GgufTokenizer(
        tokens=[vocabulary.get(number, f"[PAD{number}]") for number in range(num_rows)],
        kinds=[kinds.get(number, UNUSED) for number in range(num_rows)],
        merges=merges,
        rule=rule,
        special=special,
        add_bos=_adds_bos(text, special.get("bos_token"), folder),
        chat_template=_chat_template(folder),
        json=text,
    )


def _rule_of(tree: Mapping[str, Any], folder: Path) -> str:
    """Return llama.cpp's name of the rule by which a tokenizer cuts text.

    Raises:
        JobError: there is none.
    """
    model = tree["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _refusal(folder, f"it is {model.get('type')}, not byte-level BPE")
    if tree.get("normalizer") is not None:
        raise _refusal(folder, f"it has a normalizer ({tree['normalizer'].get('type')})")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refusal(folder, "its tokens have a prefix or suffix")
    cutting = tree.get("pre_tokenizer") or {}
    parts = cutting.get("pretokenizers", [cutting])
    found = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    for name, rule in _RULES.items():
        if found == rule and bool(model.get("ignore_merges")) == (name in _WHOLE_WORDS_FIRST):
            return name
    raise _refusal(folder, f"its pre-tokenizer is none of {', '.join(_RULES)}: {json.dumps(parts)[:200]}")


def _refusal(folder: Path, why: str) -> JobError:
    return JobError(f"llama.cpp has no tokenizer like the one in {folder}: {why}", exit_code=EXIT_BAD_INPUT)


def _special_tokens(folder: Path, numbers: Mapping[str, int]) -> dict[str, int]:
    config = _json(folder / "tokenizer_config.json")
    found = {}
    for name in _SPECIAL:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content in numbers:
            found[name] = numbers[content]
    for name in _SPECIAL[:2]:
        number = _json(folder / "config.json").get(f"{name}_id")
        if name not in found and isinstance(number, int) and number in numbers.values():
            found[name] = number
    return found


def _adds_bos(text: str, bos: int | None, folder: Path) -> bool:
    """Return whether a text begins with ``bos``.

    Raises:
        JobError: other tokens are put before or after a text.
    """
    from tokenizers import Tokenizer

    inner = Tokenizer.from_str(text)
    plain, whole = (inner.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    if whole == plain:
        return False
    if bos is not None and whole == [bos, *plain]:
        return True
    raise _refusal(folder, "it puts other tokens than bos_token around a text")


def _chat_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _json(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None


def _json(file: Path) -> dict[str, Any]:
    tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    assert isinstance(tree, dict), file
    return tree


def write_tokenizer(tokenizer: GgufTokenizer, folder: Path) -> None:
    """Write the files of a tokenizer into a model folder."""
    (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    names = {name: tokenizer.tokens[number] for name, number in tokenizer.special.items()}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2, ensure_ascii=False), encoding="utf-8")
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def tokenizer_json(
    *, tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str], rule: str, bos: int | None
) -> str:
    """Return the ``tokenizer.json`` of the lists in a file that another program wrote.

    Args:
        tokens: text of each.
        kinds: of each.
        merges: pairs, with a space between.
        rule: how text is cut.
        bos: the token that a text begins with, if one is put there.

    Raises:
        JobError: the rule is not known.
    """
    if rule not in _RULES:
        known = ", ".join(_RULES)
        raise JobError(f"its pre-tokenizer is {rule}, and only {known} are known", exit_code=EXIT_BAD_INPUT)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": number, "content": token, **flags, "special": kind == CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    vocabulary = {token: number for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))}
    parts = [{"trim_offsets": True, **part} if part["type"] == "ByteLevel" else part for part in _RULES[rule]]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": rule in _WHOLE_WORDS_FIRST,
        "vocab": vocabulary,
        "merges": [pair.split(" ") for pair in merges],
    }
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts},
        "post_processor": None if bos is None else _beginning_with(bos, tokens[bos]),
        "decoder": {"trim_offsets": True, **_BYTES},
        "model": model,
    }
    return json.dumps(tree, ensure_ascii=False)


def _beginning_with(number: int, token: str) -> dict[str, Any]:
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, sequence],
        "pair": [first, sequence, other],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
