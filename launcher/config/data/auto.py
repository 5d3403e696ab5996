"""Data of any format and shape: what ``data.path`` names, read as what it is."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from launcher.config.data import files
from launcher.config.data.base import SMALL_CHARS, Corpus, TextChunk
from launcher.config.data.bpe import END, folder_tokenizer, without_threads
from launcher.config.data.builtin import BUILTIN_DATA, builtin_rows
from launcher.config.data.chat_template import ChatTemplate, TrainOn, find_template, stand_in_template
from launcher.config.data.conversations import BadRow
from launcher.config.data.examples import Example, ExampleEncoder, OnLong, PreferencePair, RenderedExample
from launcher.config.data.formats import KIND_NAMES, BadFile, FileFormat, inspect_file, look_bytes_of_each
from launcher.config.data.hf import LONGEST_LINE_BYTES
from launcher.config.data.images import EncodedImage, ImageLimits, ImageReader
from launcher.config.data.mixture import source_names, weights_error
from launcher.config.data.rows import FirstRows, Record, count_rows, first_rows, read_rows
from launcher.config.data.shapes import (
    IMAGE_MODEL,
    SHAPES,
    TEXT_ALONE,
    Columns,
    Renderer,
    Shape,
    ShapeUnknown,
    detect_columns,
    holds_images,
    shapes_with,
)
from launcher.config.data.sources import Source, left_out_of_folder, url_problem
from launcher.config.data.text import PYTHON_DOCS, python_docs, validate_python_docs
from launcher.config.model.image_text import read_image_text
from launcher.config.paths import PathText
from launcher.errors import ConfigError
from launcher.utils.text import bytes_text, counted, cut_middle

_SKIP = "set data.on_bad_row=skip to leave such rows out"
_CHECKED_BYTES = 4 << 20
"""All rows of so many bytes of files are checked before anything starts."""
_CHECKED_ROWS = 256
_COUNTED_BYTES = 64 << 20
"""Files of this size altogether have their rows counted for the plan."""
_SHOWN_CHARS = 400
_SHOWN_COLUMNS = 12
Every = Callable[[int], bool]
EntryField = Literal["path", "eval_path"]
ENTRY_FIELDS: tuple[EntryField, ...] = ("path", "eval_path")
_EXAMPLE_PARTS = ("prompt", "response", "messages", "chosen", "rejected")
"""Parts of examples whose columns have an option; text has one besides."""


def every_row(number: int) -> bool:
    """Return True: for readers of all rows."""
    return True


@dataclass(frozen=True, kw_only=True)
class OpenFile:
    """One file of a source, and how it is read."""

    path: Path
    written: FileFormat
    columns: Columns

    def place(self, record: Record) -> str:
        """Return where a row stands, for messages."""
        unit = "row" if self.written.kind in ("json", "parquet", "arrow") else "line"
        return f"{unit} {record.line:,} of {self.path}"


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """The rows of one entry of ``data.path``."""

    name: str
    weight: float
    """Its share of a mixture, relative to the others'."""
    files: tuple[OpenFile, ...]
    """Empty of built-in data."""
    columns: Columns
    """What holds the parts of an example, the same in all files."""
    data: AutoData

    @property
    def shape(self) -> Shape:
        """What its rows are."""
        return self.columns.shape

    @property
    def is_documents(self) -> bool:
        """Whether it is text: whole files, or a column."""
        return self.shape == "text"

    def describe(self, template: ChatTemplate | None) -> str:
        """Return the shape, the columns and the number of rows, for plans."""
        if not self.files:
            builtin = BUILTIN_DATA[self.name]
            many = "" if builtin.num_rows is None else f"{builtin.num_rows:,} "
            parts = [f"{many}{builtin.label}"]
        else:
            what = SHAPES[self.shape]
            if self.files[0].written.kind != "text":
                what += f" ({', '.join(self.columns.used)})"
            many = "" if len(self.files) == 1 else f"{counted(len(self.files), 'file')}, "
            rows = "" if self.num_rows is None else f"{counted(self.num_rows, 'row')} of "
            parts = [f"{many}{rows}{what}"]
        if not self.is_documents and self.shape != "preference":
            counts = {"assistant": "assistant turns", "last": "last assistant turn", "all": "all tokens"}
            turns = counts[self.data.train_on] if template or self.data.train_on == "all" else "responses"
            parts.append(f"loss on {turns}")
        source, used = Source(name=self.name, option="data.path"), [file.path for file in self.files]
        if left_out := [file.name for file in left_out_of_folder(source, used)]:
            shown = ", ".join(left_out[:3]) + (", …" if len(left_out) > 3 else "")
            parts.append(f"{counted(len(left_out), 'file')} of the folder left out ({shown})")
        if self.data.weights:
            parts.append(f"share {self.weight / sum(self.data.weights):.1%}")
        if unused := list(dict.fromkeys(name for file in self.files for name in file.columns.unused)):
            more = f" and {len(unused) - _SHOWN_COLUMNS} more" if len(unused) > _SHOWN_COLUMNS else ""
            parts.append(f"columns not used: {', '.join(unused[:_SHOWN_COLUMNS])}{more}")
        return ", ".join(parts)

    @functools.cached_property
    def num_rows(self) -> int | None:
        """How many rows it has; ``None`` of plain text, of much data, and of damaged files."""
        if not self.files:
            return BUILTIN_DATA[self.name].num_rows
        written = [file for file in self.files if file.written.kind != "text"]
        num_bytes = sum(file.path.stat().st_size for file in written if file.written.kind != "parquet")
        if not written or num_bytes > _COUNTED_BYTES:
            return None
        try:
            return sum(count_rows(file.path, file.written, longest_line=LONGEST_LINE_BYTES) for file in written)
        except BadFile:
            return None  # the check of its rows names the place

    def fingerprint(self) -> str:
        """Return a hash of its contents."""
        if not self.files:
            return _builtin_fingerprint(self.name)
        return files.fingerprint(file.path for file in self.files)

    def placed_examples_of(
        self, file_number: int, template: ChatTemplate | None, *, wanted: Every = every_row
    ) -> Iterator[tuple[str, Example]]:
        """Yield the examples of one of ``files`` with their places, for messages.

        Of a source without files, file 0 is all of it.

        Raises:
            ConfigError: a row gives no example, and ``data.on_bad_row`` is ``refuse``.
        """
        if self.files:
            yield from self.data.examples_of_file(self.files[file_number], template, wanted=wanted)
        else:
            yield from self.placed_examples(template, wanted=wanted)

    def examples(self, template: ChatTemplate | None = None, *, wanted: Every = every_row) -> Iterator[Example]:
        """Yield the examples in a fixed order: file by file, row by row.

        Args:
            template: from :meth:`AutoData.template`.
            wanted: takes the number of a row in its file; other rows are not parsed.

        Raises:
            ConfigError: a row gives no example, and ``data.on_bad_row`` is ``refuse``.
        """
        yield from (example for _, example in self.placed_examples(template, wanted=wanted))

    def placed_examples(
        self, template: ChatTemplate | None, *, wanted: Every = every_row
    ) -> Iterator[tuple[str, Example]]:
        """Yield each example with its place, for messages."""
        if not self.files:
            yield from self.data.examples_of_builtin(self.name, self.columns, template, wanted=wanted)
        for file in self.files:
            yield from self.data.examples_of_file(file, template, wanted=wanted)

    def documents(self) -> Iterator[TextChunk]:
        """Yield the text of a source that ``is_documents``, in pieces."""
        if not self.files:
            yield from (TextChunk(text, ends_document=True) for text in python_docs())
        for file in self.files:
            if file.written.kind == "text":
                try:
                    yield from files.read_pieces(file.path, file.written)
                except BadFile as bad:
                    raise ConfigError("data.path", file.path, why=bad.why, fix=bad.fix) from bad
            else:
                for _, example in self.data.examples_of_file(file, None):
                    assert not isinstance(example, PreferencePair), "a column of text has no pairs"
                    yield TextChunk(example.text, ends_document=True)


@dataclass(frozen=True, kw_only=True)
class AutoData(Corpus):
    """Files, folders, data sets of the hub or URLs; format and shape are detected."""

    kind: ClassVar[str] = "auto"
    summary_fields: ClassVar[tuple[str, ...]] = ("path", "tokenizer")

    path: tuple[PathText, ...] | PathText = PYTHON_DOCS
    """File, glob, folder, data set of the hub (``org/name``), URL, or a list.
    Text, JSON lines, JSON, CSV, Parquet and Arrow are read, also packed by gzip, bz2, xz or zstd.
    ``python-docs`` is ``pydoc_data.topics``, 465 kB of English; ``chat-tasks`` are 2,000 made-up chats;
    ``sample-preferences`` are 64 questions, each with a short and a wordy answer."""

    weights: tuple[float, ...] = ()
    """Shares of the entries of ``path`` in training; by default each counts by its size."""

    eval_path: tuple[PathText, ...] | PathText = ()
    """Data to evaluate on, as ``path``; by default the share ``held_out`` of ``path``."""

    split: str = "train"
    """Split of a data set of the hub, or of a folder whose files are named after splits."""

    name: str | None = None
    """The configuration of a data set of the hub that has several."""

    format: Literal["auto", "text"] = "auto"
    """``text`` takes any UTF-8 text as it is, markup and rows too."""

    shape: Literal["auto", "text", "prompt_response", "messages", "alpaca", "preference"] = "auto"
    """What the rows are; ``auto`` decides by their columns."""

    text_column: str | None = None
    """Column of text; ``text`` or ``content`` by default."""

    prompt_column: str | None = None
    """Column of prompts; ``prompt``, ``question`` or ``query`` by default."""

    response_column: str | None = None
    """Column of responses; ``response``, ``completion``, ``answer`` or ``output`` by default."""

    messages_column: str | None = None
    """Column of conversations; ``messages`` or ``conversations`` by default."""

    chosen_column: str | None = None
    """Column of preferred answers; ``chosen`` by default."""

    rejected_column: str | None = None
    """Column of rejected answers; ``rejected`` by default."""

    chat_template: PathText = "auto"
    """How conversations become text: ``auto``, ``none``, a name or a Jinja file.
    ``auto`` is the tokenizer's template.
    Names: ``chatml``, ``gemma``, ``llama3``, ``plain``, ``zephyr``, or a template of the tokenizer. Prompts with
    responses are conversations of two turns where there is a template."""

    train_on: TrainOn = "assistant"
    """Tokens that the loss counts: ``assistant`` turns, the ``last`` of them, or ``all``.
    Of prompts with responses the first two mean the response."""

    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """Rows that give no example end the run, or are left out and counted."""

    on_long: OnLong = "refuse"
    """Examples longer than the sequence: ``refuse``, ``truncate`` their end, or ``drop`` them.
    Text is cut into sequences, and so is never too long."""

    packing: bool | None = None
    """Whether rows hold several examples; ``null`` packs where that works.
    They do not see each other. It does not with ``attention=flash`` or recurrent layers.
    Without packing, batches hold examples of about one
    length. Text in one entry of ``path`` is a stream of tokens, unless this is ``true``."""

    image_folder: PathText | None = None
    """Folder that paths of images start from, and that all images are in.
    By default it is that of the file whose rows name them."""

    max_image_pixels: int = ImageLimits.max_pixels
    """Width times height of the largest image that is decoded."""

    max_image_bytes: int = ImageLimits.max_bytes
    """Size of the largest file of an image."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject empty paths, wrong weights, and options that contradict each other."""
        yield from super().validate()
        if not self.path:
            yield ConfigError("data.path", "[]", why="names no data", fix=f"set data.path={PYTHON_DOCS}")
        yield from self._validate_weights()
        yield from self.validate_minimum(1, "max_image_pixels", "max_image_bytes")
        named = self.named_columns
        for part in named:
            shapes = shapes_with(part)
            if self.shape != "auto" and self.shape not in shapes:
                why = f"data.shape={self.shape} has no {part}"
                yield self.error(f"{part}_column", why, "leave it out, or set data.shape=auto")

    def _validate_weights(self) -> Iterator[ConfigError]:
        entries = self.entries("path")
        if not self.weights:
            return
        if len(self.weights) != len(entries):
            why = f"has {counted(len(self.weights), 'weight')}, and data.path names {len(entries)}"
            shown = f"[{','.join(f'{weight:g}' for weight in self.weights)}]"
            yield ConfigError("data.weights", shown, why=why, fix="give one weight for each entry of data.path")
        elif (error := weights_error("data.weights", self.weights)) is not None:
            yield error
        elif 0 in self.weights:
            unused = entries[self.weights.index(0)]
            fix = "leave it out of data.path, or give it a share"
            yield ConfigError("data.weights", why=f"{unused} has weight 0", fix=fix)

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield every entry that cannot be read, and sources that do not go together."""
        yield from super().validate_machine()
        if PYTHON_DOCS in (*self.entries("path"), *self.entries("eval_path")):
            yield from validate_python_docs(PYTHON_DOCS)
        if self.image_folder is not None and not Path(self.image_folder).expanduser().is_dir():
            yield self.error("image_folder", "there is no such folder", "name the folder of the images")
        errors, kinds = [], []
        for field in ENTRY_FIELDS:
            for entry, weight in zip(self.entries(field), self._weights(field), strict=True):
                source = Source(name=entry, option=f"data.{field}")
                try:
                    kinds.append(source.kind)
                    if source.kind == "url" and (found := url_problem(entry)) is not None:
                        errors.append(ConfigError(source.option, entry, why=found[0], fix=found[1]))
                    elif source.kind != "url":
                        self._open(source, weight, fetches=False)
                except ConfigError as error:
                    errors.append(error)
        yield from errors
        if self.name is not None and "hub" not in kinds and not any(Path(one).is_dir() for one in self.entries("path")):
            yield self.error("name", "only data sets of the hub have configurations", "leave it out")
        if not errors:
            yield from self._validate_mixture()

    def hub_names(self) -> Iterator[tuple[str, str]]:
        """Yield option and name of every data set of the hub."""
        for field in ENTRY_FIELDS:
            sources = (Source(name=entry, option=f"data.{field}") for entry in self.entries(field))
            yield from ((source.option, source.name) for source in sources if source.kind == "hub")

    def local_shapes(self) -> frozenset[Shape]:
        """Return what the rows are of all entries that are on this machine."""
        return frozenset(source.shape for field in ENTRY_FIELDS for source in self.sources(field, fetches=False))

    @property
    def shapes(self) -> frozenset[Shape]:
        """What the training rows are; data that is not here yet is downloaded."""
        return frozenset(source.shape for source in self._cached_sources)

    def check_shapes(self, sources: Sequence[DataSource]) -> None:
        """Raise where preferences and other rows would be trained together.

        Raises:
            ConfigError: no loss takes both.
        """
        pairs = [source for source in sources if source.shape == "preference"]
        if pairs and len(pairs) < len(sources):
            other = next(source for source in sources if source.shape != "preference")
            why = f"{pairs[0].name} holds preferences, and {other.name} {SHAPES[other.shape]}"
            raise ConfigError("data.path", why=why, fix="train on them in two runs")

    def _validate_mixture(self) -> Iterator[ConfigError]:
        """Yield why the sources cannot be trained together, and columns that no source has."""
        sources = [*self.sources(fetches=False), *self.sources("eval_path", fetches=False)]
        try:
            self.check_shapes(sources)
        except ConfigError as error:
            yield error
        if self.chat_template not in ("auto", "none") and sources and all(source.is_documents for source in sources):
            why = "all data is text, which is trained as it stands"
            yield self.error("chat_template", why, "leave it out, or set data.shape to what the rows are")

    def with_path(self, path: str | tuple[str, ...]) -> Self:
        """Return the same options with other data, text in equal shares, which is not packed.

        What is said of examples is left out: it says nothing about text.
        """
        unsaid: dict[str, Any] = {f"{part}_column": None for part in _EXAMPLE_PARTS}
        unsaid |= {"shape": "text" if self.shape == "text" else "auto", "chat_template": "auto"}
        return replace(self, path=path, weights=(), eval_path=(), packing=None, **unsaid)

    def entries(self, field: EntryField) -> tuple[str, ...]:
        """Return the entries of ``path`` or ``eval_path``."""
        value = getattr(self, field)
        return (value,) if isinstance(value, str) else tuple(value)

    def source_names(self, field: EntryField) -> tuple[str, ...]:
        """Return the names of the entries in metrics; none of a single entry."""
        entries = self.entries(field)
        return source_names(entries) if len(entries) > 1 else ()

    @property
    def held_out_source_names(self) -> tuple[str, ...]:
        """The names of the sources of what evaluations measure."""
        return self.source_names("eval_path" if self.entries("eval_path") else "path")

    def separates_sources(self, shapes: Collection[Shape]) -> bool:
        """Return whether the rows of each source are its own: text may be one stream through all.

        Args:
            shapes: of the rows.
        """
        return set(shapes) != {"text"} or bool(self.packing or self.weights or self.eval_path)

    def _weights(self, field: EntryField) -> tuple[float, ...]:
        return self.weights if self.weights and field == "path" else (1.0,) * len(self.entries(field))

    @property
    def named_columns(self) -> Mapping[str, str]:
        """The columns that the user named, by the part of an example that they hold."""
        given = {part: getattr(self, f"{part}_column") for part in ("text", *_EXAMPLE_PARTS)}
        return {part: name for part, name in given.items() if name is not None}

    def sources(self, field: EntryField = "path", *, fetches: bool = True) -> list[DataSource]:
        """Return the opened entries of ``path`` or ``eval_path``.

        Args:
            field: which option.
            fetches: download what is not on this machine; otherwise such entries are left out.

        Raises:
            ConfigError: an entry cannot be read, or its shape is unknown.
            EnvironmentProblem: an entry cannot be downloaded.
        """
        opened = (
            self._open(Source(name=entry, option=f"data.{field}"), weight, fetches=fetches)
            for entry, weight in zip(self.entries(field), self._weights(field), strict=True)
        )
        return [source for source in opened if source is not None]

    def _open(self, source: Source, weight: float, *, fetches: bool) -> DataSource | None:
        """Return an opened entry; ``None`` of one that would have to be fetched."""
        key = (source, weight)
        if not fetches:
            if key not in self._local and (opened := self._open_now(source, weight, fetches=False)):
                self._local[key] = opened
            return self._local.get(key)
        return self._open_now(source, weight, fetches=True)

    @functools.cached_property
    def _local(self) -> dict[tuple[Source, float], DataSource]:
        """Entries that were opened without fetching: a plan asks for them several times."""
        return {}

    def _open_now(self, source: Source, weight: float, *, fetches: bool) -> DataSource | None:
        paths = source.local_files(split=self.split, configuration=self.name, cache=self.cache_folder, fetches=fetches)
        if paths is None:
            return None
        opened = self._open_files(source, paths)
        columns = opened[0].columns if opened else self._builtin_columns(source)
        return DataSource(name=source.name, weight=weight, files=opened, columns=columns, data=self)

    def _builtin_columns(self, source: Source) -> Columns:
        builtin = BUILTIN_DATA[source.name]
        if builtin.is_text:
            return Columns(shape="text", text=builtin.columns[0])
        shape = None if self.shape == "auto" else self.shape
        try:
            return detect_columns(builtin.columns, [], shape=shape, named=self.named_columns)
        except ShapeUnknown as unknown:
            raise ConfigError(source.option, source.name, why=unknown.why, fix=unknown.fix) from unknown

    def examples(self, template: ChatTemplate | None = None) -> Iterator[Example]:
        """Yield every training example, source by source, in a fixed order.

        Raises:
            ConfigError: data cannot be read.
            EnvironmentProblem: data cannot be downloaded.
        """
        for source in self.sources():
            yield from source.examples(template)

    def template(self, tokenizer: Path | None) -> ChatTemplate | None:
        """Return the chat template of ``data.chat_template``; ``None`` without one.

        Args:
            tokenizer: folder of the tokenizer; ``None`` of a tokenizer that is trained on the data.

        Raises:
            ConfigError: there is no such template, or it is faulty.
        """
        return find_template(self.chat_template, tokenizer)

    def validate_length(self, sequence_length: int, *, tokenizer: Path | None = None) -> Iterator[ConfigError]:
        """Yield rows that give no example, and examples that are longer than a sequence.

        All rows of small local files are looked at, the first of others. Of text see :meth:`Corpus.validate_length`.

        Args:
            sequence_length: tokens in one sequence, its last label not counted.
            tokenizer: folder of the one that the data does not train; ``None`` also where a rank fetches it.
        """
        try:
            sources = [source for field in ENTRY_FIELDS for source in self.sources(field, fetches=False)]
            if all(source.is_documents for source in sources):
                if self.is_stream:
                    yield from super().validate_length(sequence_length, tokenizer=tokenizer)
                return
            template = self.plan_template(tokenizer)
            if (error := self.template_error(template, sources)) is not None:
                takes_text_alone = tokenizer is None or read_image_text(tokenizer) is None
                yield (self._images_error(sources) if takes_text_alone else None) or error
                return
            takes_images = template is not None and bool(template.image_token)
            check = _LengthCheck(tokenizer, sequence_length, self.on_long, takes_images=takes_images)
            for source in sources:
                if not source.is_documents:
                    most = self._num_checked(sources) if source.files else _CHECKED_ROWS
                    check.add(itertools.islice(source.placed_examples(template), most))
        except ConfigError as error:
            yield error
            return
        yield from check.errors()
        if check.num_examples == 1 and len(sources) == 1 and sources[0].files and not self.entries("eval_path"):
            why = f"{sources[0].name} has one example, which leaves none to evaluate on"
            fix = "give more examples, or set data.eval_path to examples to evaluate on"
            yield self.error("held_out", why, fix)

    def _num_checked(self, sources: Sequence[DataSource]) -> int | None:
        """Return how many examples of a source are checked before anything starts; ``None``: all."""
        num_bytes = sum(file.path.stat().st_size for source in sources for file in source.files)
        return None if num_bytes <= _CHECKED_BYTES else _CHECKED_ROWS

    def template_error(self, template: ChatTemplate | None, sources: Sequence[DataSource]) -> ConfigError | None:
        """Return the error of conversations without a template, which only it makes text of."""
        source = next((one for one in sources if one.shape == "messages"), None)
        if template is not None or source is None:
            return None
        if self.chat_template == "none":
            why, fix = f"{source.name} holds conversations, which only a template makes text of", "leave it out"
            return self.error("chat_template", why, f"{fix}, or set data.chat_template=chatml")
        why = f"{source.name} holds conversations, and the tokenizer has no chat template"
        return self.error("chat_template", why, "set data.chat_template=chatml, or a Jinja file")

    def _images_error(self, sources: Sequence[DataSource]) -> ConfigError | None:
        """Return the error of the first conversation with images; ``None`` without any."""
        if self.on_bad_row == "skip":
            return None
        for file in (file for source in sources if source.shape == "messages" for file in source.files):
            for record in itertools.islice(self._records(file, every_row), _CHECKED_ROWS):
                if not record.problem and holds_images(record.fields, file.columns):
                    return self._bad_row(f"{file.place(record)} {TEXT_ALONE}", IMAGE_MODEL)
        return None

    def plan_template(self, tokenizer: Path | None) -> ChatTemplate | None:
        """Return the template with which rows are checked before anything starts.

        Of a tokenizer that a rank fetches, one that writes every conversation stands in for its own.
        """
        is_unknown = tokenizer is None and not self.trains_tokenizer
        if is_unknown and self.chat_template == "auto":
            return stand_in_template()
        return self.template(tokenizer)

    def describe(self, tokenizer: Path | None) -> Iterator[tuple[str, str]]:
        """Yield what local data holds, and its first example, with names for plans.

        Args:
            tokenizer: folder of the tokenizer; ``None`` where it is trained on the data, or not here yet.
        """
        sources = self.sources(fetches=False)
        if all(source.is_documents for source in sources) and self.is_plain:
            return
        is_unknown = tokenizer is None and not self.trains_tokenizer and self.chat_template == "auto"
        template = self.plan_template(tokenizer)
        for field in ENTRY_FIELDS:
            entries = self.entries(field)
            for number, (entry, weight) in enumerate(zip(entries, self._weights(field), strict=True)):
                opened = self._open(Source(name=entry, option=f"data.{field}"), weight, fetches=False)
                label = "data" if field == "path" else "evaluated on"
                label += f" {entry}" if len(entries) > 1 else ""
                label += f" ({entries[: number + 1].count(entry)})" if entries.count(entry) > 1 else ""
                yield label, "downloaded by the first rank" if opened is None else opened.describe(template)
        examples = (one for source in sources if not source.is_documents for one in source.examples(template))
        first = next(examples, None)
        if first is None:
            return
        how = (
            "none: prompts and responses as they stand"
            if template is None
            else self._template_words(template, tokenizer)
        )
        yield "chat template", "of the tokenizer, which the first rank fetches" if is_unknown else how
        if not is_unknown:
            yield "first example", marked_text(first, limit=_SHOWN_CHARS)
        if template is not None and template.image_token:
            shown = [source.placed_examples(template) for source in sources if not source.is_documents]
            first_of_each = (itertools.islice(placed, _CHECKED_ROWS) for placed in shown)
            found = images_text(example for placed in first_of_each for _, example in placed)
            ends = "; an example with images that is too long ends the run all the same (data.on_long=truncate)"
            yield "images", f"{found}{ends if self.on_long == 'truncate' else ''}"

    def _template_words(self, template: ChatTemplate, tokenizer: Path | None) -> str:
        """Return a template's name, and whether servers can stop where its turns end."""
        end = template.turn_end
        if tokenizer is None and not self.trains_tokenizer:
            return template.label  # the first rank fetches the tokenizer, so its tokens are unknown
        known = None if tokenizer is None or not end else folder_tokenizer(tokenizer)
        is_token = end == END if tokenizer is None else known is None or known.token_to_id(end) is not None
        if not end or is_token:
            return template.label
        return f"{template.label}; {end}, which ends turns, is no token of this tokenizer, so answers do not end there"

    @property
    def is_plain(self) -> bool:
        """Whether nothing but a single path of training data is set."""
        return not self.weights and not self.eval_path and len(self.entries("path")) == 1

    def _open_files(self, source: Source, paths: list[Path]) -> tuple[OpenFile, ...]:
        look_bytes = look_bytes_of_each(len(paths))
        opened: list[OpenFile] = []
        for path in paths:
            try:
                written = inspect_file(
                    path,
                    plain="data.format=text",
                    as_text=self.format == "text",
                    by_row=self.on_bad_row == "skip",
                    look_bytes=look_bytes,
                )
                if written.kind == "markup":
                    fix = "extract its text, or set data.format=text to train on the tags too"
                    raise BadFile(f"holds {KIND_NAMES[written.kind]}, not plain text", fix)
                columns = opened[0].columns if opened and len(paths) > _CHECKED_ROWS else self._columns(path, written)
            except BadFile as bad:
                raise ConfigError(source.option, path, why=bad.why, fix=bad.fix) from bad
            if opened and columns != opened[0].columns:
                first = opened[0]
                why = f"holds {_described(columns)}, and {first.path} {_described(first.columns)}"
                raise ConfigError(source.option, path, why=why, fix="name them as two entries of data.path")
            opened.append(OpenFile(path=path, written=written, columns=columns))
        return tuple(opened)

    def _columns(self, path: Path, written: FileFormat) -> Columns:
        if written.kind == "text":
            return Columns(shape="text", text="text")
        first = self._first_rows(path, written)
        if first.is_empty:
            raise BadFile("holds no rows", "give a file with rows")
        shape = None if self.shape == "auto" else self.shape
        try:
            return detect_columns(first.columns, first.text_columns, shape=shape, named=self.named_columns)
        except ShapeUnknown as unknown:
            bad = next((record for record in first.records if record.problem), None)
            if bad is not None and not first.columns:
                raise BadFile(f"line {bad.line:,} {bad.problem}", bad.fix or "correct it") from unknown
            if written.kind != "csv":
                raise BadFile(unknown.why, unknown.fix) from unknown
            spaced = [name for name in first.columns if name != name.strip()]
            fix = "remove the spaces around the names in its first line" if spaced else unknown.fix
            raise BadFile(f"{unknown.why} (its first line is taken as the header)", fix) from unknown

    def _first_rows(self, path: Path, written: FileFormat) -> FirstRows:
        return first_rows(path, written, longest_line=LONGEST_LINE_BYTES)

    def examples_of_file(
        self, file: OpenFile, template: ChatTemplate | None, *, wanted: Every = every_row
    ) -> Iterator[tuple[str, Example]]:
        """Yield the examples of a file with their places.

        A file of plain text is one document.

        Raises:
            ConfigError: a row gives no example, and ``data.on_bad_row`` is ``refuse``; or none does.
        """
        try:
            records = self._records(file, wanted)
            yield from self._examples(
                records, file.columns, template, place=file.place, origin=file.path, wanted=wanted
            )
        except BadFile as bad_file:
            raise ConfigError("data.path", file.path, why=bad_file.why, fix=bad_file.fix) from bad_file
        except OSError as error:
            why = f"cannot be read: {error.strerror or error}"
            raise ConfigError("data.path", file.path, why=why, fix="check the disk it is on") from error

    def examples_of_builtin(
        self, name: str, columns: Columns, template: ChatTemplate | None, *, wanted: Every
    ) -> Iterator[tuple[str, Example]]:
        """Yield the examples of built-in data with their places."""
        unit = BUILTIN_DATA[name].unit
        records = (Record(number, number + 1, row) for number, row in enumerate(builtin_rows(name)) if wanted(number))
        yield from self._examples(
            records, columns, template, place=lambda record: f"{unit} {record.line:,}", origin=name, wanted=wanted
        )

    def _image_folder(self, file: Path) -> Path:
        """Return the folder that the images of a file's rows are in."""
        return file.parent if self.image_folder is None else Path(self.image_folder).expanduser()

    @property
    def image_limits(self) -> ImageLimits:
        """The largest image that is decoded."""
        return ImageLimits(max_pixels=self.max_image_pixels, max_bytes=self.max_image_bytes, group="data")

    def _examples(
        self,
        records: Iterable[Record],
        columns: Columns,
        template: ChatTemplate | None,
        *,
        place: Callable[[Record], str],
        origin: object,
        wanted: Every,
    ) -> Iterator[tuple[str, Example]]:
        reader = ImageReader(folder=self._image_folder(Path(str(origin))), limits=self.image_limits)
        renderer = Renderer(columns=columns, template=template, train_on=self.train_on, images=reader)
        num_rows = num_bad = 0
        first_bad = ""
        for record in records:
            num_rows += 1
            try:
                if record.problem:
                    raise BadRow(record.problem)
                example = renderer.example(record.fields)
            except BadRow as bad:
                where = place(record)
                if self.on_bad_row == "refuse":
                    raise self._bad_row(bad.at(where), bad.fix, repair=record.fix) from bad
                first_bad = first_bad or bad.at(where)
                num_bad += 1
                continue
            yield place(record), example
        if num_bad and num_bad == num_rows and wanted is every_row:
            why = f"none of its {num_rows:,} rows is an example; {first_bad}"
            raise ConfigError("data.path", origin, why=why, fix="correct the rows, or give other data")
        if num_bad:
            _print_once(f"{num_bad:,} of {num_rows:,} rows of {origin} are skipped; the first: {first_bad}")

    def refuse_or_skip(self, why: str, fix: str) -> None:
        """Refuse or skip a row, as ``on_bad_row`` says, whose images cannot be decoded.

        Raises:
            ConfigError: it says to refuse it.
        """
        if self.on_bad_row == "refuse":
            raise self._bad_row(why, fix)
        print(f"a row is skipped: {why}", flush=True)

    @staticmethod
    def _bad_row(why: str, fix: str, *, repair: str = "") -> ConfigError:
        remedy = f"{_SKIP}, or {repair}" if repair else f"{fix or 'correct it'}, or {_SKIP}"
        return ConfigError("data.path", None, why=why, fix=remedy)

    def _records(self, file: OpenFile, wanted: Every) -> Iterator[Record]:
        if file.written.kind == "text":
            text = "".join(piece.text for piece in files.read_pieces(file.path, file.written))
            if wanted(0):
                yield Record(0, 1, {"text": text})
            return
        yield from read_rows(
            file.path, file.written, wanted, longest_line=LONGEST_LINE_BYTES, columns=file.columns.readable
        )

    @property
    def is_documents(self) -> bool:
        """Whether all data is text, which is trained as one stream of tokens.

        Data that is not here yet is downloaded.
        """
        return all(source.is_documents for source in self._cached_sources)

    @property
    def is_stream(self) -> bool:
        """Whether training cuts sequences from one stream of text, the end of which is held out."""
        return self.is_documents and not self.separates_sources({"text"})

    @property
    def holds_examples(self) -> bool:
        """Whether data that is here, without a download, holds examples instead of text."""
        return any(not source.is_documents for source in self.sources(fetches=False))

    def fingerprint(self) -> str:
        """Return a string that changes with the data and the text that is made of it."""
        return json.dumps([self.chat_template, self.examples_fingerprint(self._cached_sources, None)])

    def examples_fingerprint(self, sources: Sequence[DataSource], template: ChatTemplate | None) -> str:
        """Return a string that changes with the examples of ``sources``, rendered by ``template``."""
        decides = [self.format, self.shape, sorted(self.named_columns.items()), self.on_bad_row, self.split, self.name]
        how: list[Any] | None = None if template is None else [template.source, sorted(template.special_tokens.items())]
        if how is not None and template is not None and template.image_token:
            folders = sorted({self._image_folder(file.path) for source in sources for file in source.files})
            how += [template.image_token, list(map(os.path.realpath, folders))]
            how += [self.max_image_pixels, self.max_image_bytes]
        return json.dumps([decides, self.train_on, how, [source.fingerprint() for source in sources]])

    @functools.cached_property
    def _cached_sources(self) -> list[DataSource]:
        return self.sources()

    def local_pieces(self) -> Iterator[TextChunk]:
        """Yield the text of every source, in order."""
        for source in self._cached_sources:
            if source.is_documents:
                yield from source.documents()
            else:
                yield from _texts(source.examples(self.template(None)))

    @property
    def text_bytes(self) -> int | None:
        """Bytes of the files; ``None`` of built-in text, compressed files, and columns of text."""
        opened = [file for source in self._cached_sources for file in source.files]
        if not all(source.files for source in self._cached_sources) or any(
            file.written.kind != "text" for file in opened
        ):
            return None
        return files.text_bytes(file.path for file in opened)

    def small_pieces(self, most: int = SMALL_CHARS) -> list[TextChunk] | None:
        """Return the whole text of small local data."""
        sources = self.sources(fetches=False)
        if len(sources) < len(self.entries("path")) or not all(source.is_documents for source in sources):
            return None
        if any(not source.files for source in sources) and most <= SMALL_CHARS:
            return None
        if sum(file.path.stat().st_size for source in sources for file in source.files) > most:
            return None
        return files.beginning(itertools.chain.from_iterable(source.documents() for source in sources), most)


class _LengthCheck:
    """Counts examples that are longer than a sequence, and may not be.

    How many tokens an image takes, only its processor knows, which a rank loads: here each counts as one.
    """

    def __init__(self, tokenizer: Path | None, sequence_length: int, on_long: OnLong, *, takes_images: bool) -> None:
        counts = on_long == "refuse" or (on_long == "truncate" and takes_images)
        loaded = None if tokenizer is None or not counts else folder_tokenizer(tokenizer)
        self._encoder = None if loaded is None else ExampleEncoder(loaded, end_id=None)
        self._on_long, self._most, self._longest, self._place = on_long, sequence_length + 1, 0, ""
        self._num_long = self.num_examples = self._num_images = 0
        self._has_images = False

    def add(self, examples: Iterable[tuple[str, Example]]) -> None:
        for batch in _batches(examples):
            self.num_examples += len(batch)
            if self._encoder is None:
                continue
            with without_threads():
                lengths = iter(self._encoder.count_tokens([one for _, each in batch for one in texts_of(each)]))
            for place, example in batch:
                # and the end of text
                length = max(next(lengths) + (not one.has_special_tokens) for one in texts_of(example))
                num_images = sum(len(one.images) for one in texts_of(example))
                self._has_images |= num_images > 0
                if self._on_long == "truncate" and not num_images:
                    continue  # its end is cut off
                self._num_long += length > self._most
                if length > self._longest:
                    self._longest, self._place, self._num_images = length, place, num_images

    def errors(self) -> Iterator[ConfigError]:
        if not self._num_long:
            return
        verb = "is" if self._num_long == 1 else "are"
        why = f"{self._num_long:,} of {counted(self.num_examples, 'example')} {verb} longer than a sequence of "
        why += f"{self._most - 1:,} + 1 tokens; the longest, {self._place}, has {self._longest:,}"
        fix = f"set job.sequence_length={self._longest - 1}, or data.on_long=truncate or drop"
        if self._num_images:
            images = "its image" if self._num_images == 1 else f"each of its {self._num_images:,} images"
            why += f", {images} counted as one token"
        if self._has_images:
            fix = f"set job.sequence_length to more than {self._longest - 1} (the first rank counts the tokens of "
            fix += "images), or data.on_long=drop"
        if self._on_long == "truncate":
            why += "; what is cut off could be a part of an image"
        yield ConfigError("data.on_long", self._on_long, why=why, fix=fix)


def _batches(examples: Iterable[tuple[str, Example]]) -> Iterator[list[tuple[str, Example]]]:
    rest = iter(examples)
    while batch := list(itertools.islice(rest, _CHECKED_ROWS)):
        yield batch


def texts_of(example: Example) -> tuple[RenderedExample, ...]:
    """Return the sequences of an example: itself, or the two of a pair."""
    return (example.chosen, example.rejected) if isinstance(example, PreferencePair) else (example,)


def marked_text(example: Example, *, limit: int) -> str:
    """Return an example in one line of ``limit`` characters, trained text in ⟦brackets⟧.

    Of a pair, the rejected answer follows the whole example of the chosen one.
    """
    chosen, *rejected = (_marked(one) for one in texts_of(example))
    if rejected:
        answer = "".join(f"⟦{one.text}⟧" for one in texts_of(example)[1].segments if one.is_trained)
        return f"{_line(chosen, limit=limit // 2)} rejected: {_line(answer, limit=limit // 2)}"
    return _line(chosen, limit=limit)


def _marked(example: RenderedExample) -> str:
    return "".join(f"⟦{one.text}⟧" if one.is_trained else one.text for one in example.segments)


def images_text(examples: Iterable[Example]) -> str:
    """Return how many images some examples have, and the sizes of the smallest and the largest."""
    found, num_examples, num_with = list[EncodedImage](), 0, 0
    for example in examples:
        held = [image for one in texts_of(example) for image in one.images]
        num_examples += 1
        num_with += bool(held)
        found += held
    if not found:
        return f"none in the first {counted(num_examples, 'row')}"
    by_size = sorted(found, key=lambda image: image.width * image.height)
    sizes = dict.fromkeys(f"{image.width:,} × {image.height:,}" for image in (by_size[0], by_size[-1]))
    num_bytes = bytes_text(sum(image.num_bytes for image in found))
    rows = f"{num_with:,} of the first {counted(num_examples, 'row')}"
    return f"{len(found):,} in {rows}, {' to '.join(sizes)} pixels, {num_bytes}"


def _line(text: str, *, limit: int) -> str:
    return one_line_of(cut_middle(text, limit=limit))


def one_line_of(text: str) -> str:
    """Return a text with its line ends and tabs written as escapes."""
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def _texts(examples: Iterator[Example]) -> Iterator[TextChunk]:
    for example in examples:
        yield from (TextChunk(one.text, ends_document=True) for one in texts_of(example))


def _described(columns: Columns) -> str:
    return f"{columns.shape} ({', '.join(columns.used)})"


@functools.cache
def _builtin_fingerprint(name: str) -> str:
    return hashlib.sha256("\0".join(map(json.dumps, builtin_rows(name))).encode()).hexdigest()


@functools.cache
def _print_once(message: str) -> None:
    print(message, flush=True)
