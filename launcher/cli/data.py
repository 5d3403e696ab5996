"""``launch data preview``: training examples with the tokens that the loss counts."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from launcher.cli.arguments import Arguments
from launcher.config.compose import compose
from launcher.config.data.auto import AutoData, DataSource, texts_of
from launcher.config.data.bpe import END, folder_tokenizer, train_byte_level_bpe, without_threads
from launcher.config.data.chat_template import ChatTemplate, special_tokens
from launcher.config.data.examples import ExampleEncoder, PreferencePair, RenderedExample, TextSegment, fit_example
from launcher.config.run import BatchedJob, Run
from launcher.config.snapshot import dump_run
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.execution.run_references import resolve_run_references
from launcher.execution.validate_inputs import local_tokenizer_folder
from launcher.protocol.rundir import RunDir
from launcher.utils.system import run_in_foreground
from launcher.utils.text import counted, printable

if TYPE_CHECKING:
    import tokenizers

_ROWS, _MOST_ROWS = 3, 10_000
_DOCUMENT_CHARS = 2000
"""Of plain text so much of each document is shown."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Tokenizer and limits with which examples are shown."""

    encoder: ExampleEncoder
    sequence_length: int
    data: AutoData

    def lines(self, title: str, example: RenderedExample) -> Iterator[tuple[str, bool | None]]:
        """Yield the pieces of one example's text: whether the loss counts them, ``None`` for titles."""
        encoded = self.encoder.encode(example)
        parts = [title, counted(len(encoded.ids), "token"), f"{encoded.num_trained:,} trained"]
        if example.images:
            sizes = ", ".join(f"{image.width:,} × {image.height:,}" for image in example.images)
            parts.append(f"{counted(len(example.images), 'image')} ({sizes}), whose tokens a rank counts")
        try:
            fitted = fit_example(encoded, self.sequence_length + 1, self.data.on_long)
            if fitted is None:
                parts.append("left out: it is longer than a sequence")
            elif len(fitted.ids) < len(encoded.ids):
                parts.append(f"truncated to {len(fitted.ids):,} (data.on_long=truncate)")
        except ValueError as error:
            parts.append(f"{error}: refused (data.on_long=refuse)")
        yield " · ".join(parts) + "\n", None
        yield from self.encoder.pieces(example)
        yield "\n\n", None


def run(arguments: Arguments) -> int:
    """Print the first examples of a run's data."""
    overrides, num_rows = _take_rows(arguments.overrides)
    composed = compose(overrides, config_dir=arguments.config_dir)
    run = resolve_run_references(composed)
    data = run.data
    if not isinstance(data, AutoData):
        fix = "set data=auto data.path=…"
        raise ConfigError("data", data.kind, why="only data=auto has examples to look at", fix=fix)
    errors = list(data.validate_machine())
    if errors:
        raise errors[0]
    folder = _tokenizer_folder(run)
    template, sources = data.template(folder), data.sources()
    if (error := data.template_error(template, sources)) is not None:
        raise error
    tokenizer, end_id = _tokenizer(data, folder)
    length = run.job.sequence_length if isinstance(run.job, BatchedJob) else sys.maxsize - 1
    encoder = ExampleEncoder(tokenizer, end_id=end_id)
    preview = Preview(encoder=encoder, sequence_length=length, data=data)
    write = _writer(sys.stdout)
    each = [num_rows // len(sources) + (number < num_rows % len(sources)) for number in range(len(sources))]
    for source, wanted in zip(sources, each, strict=True):
        if wanted:
            write(f"{source.name}: {source.describe(template)}\n\n", None)
        for text, is_trained in _shown(source, preview, template, wanted):
            write(text, is_trained)
    return 0


def _shown(
    source: DataSource, preview: Preview, template: ChatTemplate | None, wanted: int
) -> Iterator[tuple[str, bool | None]]:
    """Yield the pieces of the first examples of a source."""
    if source.is_documents:
        for number, piece in enumerate(itertools.islice(source.documents(), wanted), 1):
            text = piece.text if len(piece.text) <= _DOCUMENT_CHARS else piece.text[:_DOCUMENT_CHARS]
            cut = "" if text == piece.text else f" (its first {_DOCUMENT_CHARS:,} characters)"
            whole = RenderedExample((TextSegment(text, True),))
            num_tokens = len(preview.encoder.encode(whole).ids)
            yield f"text {number}{cut} · {counted(num_tokens, 'token')}, all trained\n", None
            yield text, True
            yield "\n\n", None
        return
    for place, example in itertools.islice(source.placed_examples(template), wanted):
        if isinstance(example, PreferencePair):
            for name, one in zip(("chosen", "rejected"), texts_of(example), strict=True):
                yield from preview.lines(f"{place} · {name}", one)
        else:
            yield from preview.lines(place, example)


def _take_rows(words: Sequence[str]) -> tuple[list[str], int]:
    """Return the words without ``rows``, and the number of rows to show.

    Raises:
        ConfigError: it is no such number.
    """
    kept, num_rows = [], _ROWS
    for word in words:
        name, _, value = word.partition("=")
        if name != "rows":
            kept.append(word)
        elif value.isdecimal() and 0 < int(value) <= _MOST_ROWS:
            num_rows = int(value)
        else:
            raise ConfigError("rows", value, why=f"takes a number from 1 to {_MOST_ROWS:,}", fix="write rows=3")
    return kept, num_rows


def _tokenizer_folder(run: Run) -> Path | None:
    """Return the folder of a tokenizer that the data does not train.

    A process of its own fetches one that is missing.

    Raises:
        EnvironmentProblem: it cannot be fetched.
    """
    data = run.data
    assert isinstance(data, AutoData), "checked by the caller"
    if data.trains_tokenizer:
        return None
    folder = local_tokenizer_folder(run, RunDir(Path(run.run.dir or run.run.root)), data.tokenizer)
    if folder is not None and (folder / "tokenizer.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as made:
        snapshot = Path(made) / "run.yaml"
        snapshot.write_text(dump_run(run), encoding="utf-8")
        answer = Path(made) / "folder"
        code = run_in_foreground([sys.executable, "-m", "launcher.jobs.fetch_tokenizer", str(snapshot), str(answer)])
        if code:
            raise EnvironmentProblem(f"data.tokenizer={data.tokenizer} cannot be fetched; see the error above")
        return Path(answer.read_text(encoding="utf-8"))


def _tokenizer(data: AutoData, folder: Path | None) -> tuple[tokenizers.Tokenizer, int | None]:
    """Return the tokenizer and its end-of-text token.

    Raises:
        ConfigError: only a rank can load it.
    """
    if folder is None:
        with without_threads():
            texts = (piece.text for piece in data.local_pieces())
            trained = train_byte_level_bpe(texts, vocab_size=data.vocab_size)
        return trained, trained.token_to_id(END)
    loaded = folder_tokenizer(folder)
    if loaded is None:
        why = f"{folder} holds no tokenizer.json that can be loaded"
        raise ConfigError("data.tokenizer", data.tokenizer, why=why, fix="give the folder of a fast tokenizer")
    end = special_tokens(folder).get("eos_token")
    return loaded, None if end is None else loaded.token_to_id(end)


def _writer(stream: TextIO) -> Callable[[str, bool | None], None]:
    """Return a function that writes text: coloured on a terminal, else trained text in brackets."""
    if not stream.isatty():

        def write_plain(text: str, is_trained: bool | None) -> None:
            shown = printable(text)
            stream.write(f"⟦{shown}⟧" if is_trained else shown)

        return write_plain
    from rich.console import Console
    from rich.text import Text

    terminal = Console(file=stream, highlight=False, soft_wrap=True)
    styles = {None: "bold", True: "black on green", False: "dim"}

    def write(text: str, is_trained: bool | None) -> None:
        terminal.print(Text(printable(text), style=styles[is_trained]), end="")

    return write
