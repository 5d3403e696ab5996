"""The token cache: a corpus tokenized once per machine, by its own BPE or a given tokenizer.

A cache folder holds ``tokens.arrow`` (a column of token lists; read one after the other they are the stream),
``stream.json`` (where in that file the tokens lie, and checksums) and ``tokenizer.json``. Its name is a hash of the
text, the tokenizer and this format, and nothing in it depends on the sequence length or the held-out share.
"""

from __future__ import annotations

import functools
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from launcher.config.data.base import STREAM_LAYOUT, Corpus, TextChunk
from launcher.config.data.bpe import END, train_byte_level_bpe
from launcher.config.data.chat_template import ChatTemplate, write_default_template
from launcher.config.model.base import Model
from launcher.data.corpus import read_corpus
from launcher.data.progress import TokenisingProgress
from launcher.models.pretrained import tokenizer_folder, tokenizer_folder_option
from launcher.models.tokenizer import FastTokenizer, copy_tokenizer, load_tokenizer
from launcher.utils.build_cache import build_once
from launcher.utils.files import read_json, read_object, sha256_of, write_atomic, write_json
from launcher.utils.hub import fetch_model
from launcher.utils.text import bytes_text


def train_bpe(pieces: Iterable[TextChunk], *, vocab_size: int) -> FastTokenizer:
    """Return a corpus's byte-level BPE of at most ``vocab_size`` tokens; equal for equal texts."""
    inner = train_byte_level_bpe((piece.text for piece in pieces), vocab_size=vocab_size)
    return FastTokenizer(inner=inner, end_id=inner.token_to_id(END))


def read_bpe(file: Path) -> FastTokenizer:
    """Return a tokenizer that ``to_json`` wrote."""
    from tokenizers import Tokenizer as Inner

    inner = Inner.from_file(str(file))
    return FastTokenizer(inner=inner, end_id=inner.token_to_id(END))


_TOKENS, _TOKENIZER = "tokens.arrow", "tokenizer.json"
_GENERATION = "generation_config.json"
_CHECKED_BYTES = 4 << 30
"""Tokens of more bytes are compared by size alone: reading them takes over two seconds."""
_BLOCK_BYTES = 16 << 20
_SHOWN_S = 1.0
"""A comparison that takes longer is printed."""
_PIECES_AT_ONCE = 64
_ROWS_AT_ONCE = 4096


def token_folder(
    data: Corpus, model: Model, *, heartbeat: Callable[[], None], tokenizer: FastTokenizer | None = None
) -> tuple[Path, FastTokenizer]:
    """Return the token cache of ``data``, built if missing, and the tokenizer.

    Any number of processes may call this at once: one builds, the others wait.

    Args:
        data: the corpus.
        model: whose own tokenizer the corpus may name.
        heartbeat: called meanwhile.
        tokenizer: tokenises the corpus instead of the one that it names.
    """
    given = tokenizer
    if given is None and not data.trains_tokenizer:
        given = given_tokenizer(data, model, heartbeat=heartbeat)
    spec = data.trained_tokenizer if given is None else f"{given.end_id} {sha256_of(given.to_json().encode())}"

    def build(folder: Path) -> None:
        heartbeat()
        tokenizer = given or train_bpe(read_corpus(data), vocab_size=data.vocab_size)
        heartbeat()
        (folder / _TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
        write_tokens(folder, data, tokenizer, heartbeat=heartbeat)

    option = "data.cache" if data.cache else "XDG_CACHE_HOME"
    is_intact = functools.partial(_is_intact, heartbeat=heartbeat)
    folder = build_once(data.token_cache(spec), build, heartbeat=heartbeat, option=option, is_intact=is_intact)
    return folder, given or read_bpe(folder / _TOKENIZER)


def _is_intact(folder: Path, *, heartbeat: Callable[[], None]) -> bool:
    """Return whether a cache folder holds layout, tokens and tokenizer as they were written.

    Contents are compared by checksum, tokens of more than 4 GiB by size alone: reading those would take longer than
    the rest of a start.
    """
    started = time.monotonic()
    try:
        layout = read_json(folder / STREAM_LAYOUT)
        size = {"uint16": 2, "uint32": 4}[layout["dtype"]]
        ends = [start + count * size for start, count in layout["segments"]]
        num_bytes = (folder / _TOKENS).stat().st_size
        if layout["file"] != _TOKENS or max(ends, default=0) > num_bytes:
            return False
        names = (_TOKENIZER, _TOKENS) if num_bytes <= _CHECKED_BYTES else (_TOKENIZER,)
        is_whole = all(_checksum(folder / name, heartbeat=heartbeat) == layout["crc32"][name] for name in names)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    taken_s = time.monotonic() - started
    if taken_s > _SHOWN_S:
        print(f"compared {bytes_text(num_bytes)} of cached tokens with their checksum in {taken_s:.1f} s", flush=True)
    return is_whole


def _checksum(file: Path, *, heartbeat: Callable[[], None]) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            found = zlib.crc32(block, found)
            heartbeat()
    return found


def given_tokenizer(data: Corpus, model: Model, *, heartbeat: Callable[[], None]) -> FastTokenizer:
    """Return the tokenizer that ``data`` names, the model's or a folder's; fetch it if missing."""
    folder, option = given_folder(data, model, heartbeat=heartbeat), "data.tokenizer"
    config_option = tokenizer_folder_option(model) if data.tokenizer == "model" else option
    return load_tokenizer(folder, option=option, config_option=config_option)


def given_folder(data: Corpus, model: Model, *, heartbeat: Callable[[], None]) -> Path:
    """Return the folder of the tokenizer that ``data`` names; fetch it if missing."""
    if data.tokenizer == "model":
        return tokenizer_folder(model, heartbeat=heartbeat)
    if (folder := Path(data.tokenizer).expanduser()).is_dir():
        return folder
    return fetch_model(data.tokenizer, with_weights=False, option="data.tokenizer", instead="set data.tokenizer=bpe")


def save_tokenizer(
    data: Corpus, model: Model, tokenizer: FastTokenizer, folder: Path, *, heartbeat: Callable[[], None]
) -> None:
    """Write the tokenizer of ``data`` and its chat template into a model folder.

    Args:
        data: what the model is trained on.
        model: whose own tokenizer ``data`` may take.
        tokenizer: of ``data``, open.
        folder: made where it does not exist.
        heartbeat: called meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not data.trains_tokenizer:
        copy_tokenizer(given_folder(data, model, heartbeat=heartbeat), folder)
    if not (folder / _TOKENIZER).exists():
        end = {} if tokenizer.end_id is None else {"eos_token": tokenizer.inner.id_to_token(tokenizer.end_id)}
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **end})
        write_atomic(folder / _TOKENIZER, tokenizer.to_json())
    if tokenizer.end_id is not None and not (folder / _GENERATION).exists():
        write_json(folder / _GENERATION, {"eos_token_id": tokenizer.end_id})
    if tokenizer.chat_template is not None:
        write_default_template(folder, tokenizer.chat_template.source)
        _end_generation_with(tokenizer.chat_template, tokenizer, folder)


def _end_generation_with(template: ChatTemplate, tokenizer: FastTokenizer, folder: Path) -> None:
    """Add the token that ends the assistant's turns to those that end generation."""
    token = tokenizer.inner.token_to_id(template.turn_end)
    file = folder / _GENERATION
    settings = read_object(file) if file.exists() else {}
    given = settings.get("eos_token_id")
    known = [] if given is None else list(given) if isinstance(given, list) else [given]
    if token is not None and token not in known:
        write_json(file, {**settings, "eos_token_id": [*known, token]})


def write_tokens(folder: Path, data: Corpus, tokenizer: FastTokenizer, *, heartbeat: Callable[[], None]) -> None:
    """Tokenise the whole corpus into an empty folder, for ``open_stream`` to map.

    Imports ``datasets``.
    """
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    features = Features({"tokens": List(Value(dtype))})
    with ArrowWriter(path=str(folder / _TOKENS), features=features, writer_batch_size=_ROWS_AT_ONCE) as writer:
        progress = TokenisingProgress(bytes_text, total=data.text_bytes)
        for num_bytes, rows in _rows(data, tokenizer):
            writer.write_batch({"tokens": rows})
            progress.add(num_bytes, tokens=sum(map(len, rows)))
            heartbeat()
        progress.end()
        writer.finalize()
    files = [file for file in (folder / _TOKENS, folder / _TOKENIZER) if file.exists()]
    layout = {
        "source": data.fingerprint(),
        "file": _TOKENS,
        "dtype": dtype,
        "segments": _segments(folder / _TOKENS),
        "crc32": {file.name: _checksum(file, heartbeat=heartbeat) for file in files},
    }
    write_json(folder / STREAM_LAYOUT, layout)


def _rows(data: Corpus, tokenizer: FastTokenizer) -> Iterator[tuple[int, list[list[int]]]]:
    """Yield the bytes of some text, and its tokens."""
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    pieces = read_corpus(data)
    while batch := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
        texts = [piece.text for piece in batch]
        encoded = tokenizer.encode_batch(texts)
        rows = [ids + end if piece.ends_document else ids for ids, piece in zip(encoded, batch, strict=True)]
        yield sum(len(text.encode(errors="replace")) for text in texts), rows


def _segments(file: Path) -> list[tuple[int, int]]:
    """Return byte position and token count of each contiguous run in an Arrow stream file."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        base = source.read_buffer().address
        source.seek(0)
        found = []
        for batch in pa.ipc.open_stream(source):
            tokens = batch.column("tokens").flatten()
            if len(tokens):
                start = tokens.buffers()[1].address - base + tokens.offset * tokens.type.bit_width // 8
                found.append((start, len(tokens)))
        return found
