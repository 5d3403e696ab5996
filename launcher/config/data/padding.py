"""The share of a batch that would be padding, from some rows, for plans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.config.data.auto import AutoData, DataSource, texts_of
from launcher.config.data.base import SMALL_CHARS
from launcher.config.data.bpe import without_threads
from launcher.config.data.examples import ExampleEncoder, RenderedExample, TextSegment
from launcher.config.data.mixture import exact_weights
from launcher.config.data.order import (
    SORTED_ROWS,
    ByLength,
    Mixture,
    SampleOrder,
    Shuffled,
    held_out_numbers,
    padded_length,
)

if TYPE_CHECKING:
    import tokenizers

    from launcher.config.data.chat_template import ChatTemplate
    from launcher.config.data.examples import Example
    from launcher.protocol.plan import Batch

PADDING_STEPS = 8
"""First steps of a run whose padding the plan names, and the run at its start."""
_MOST_ROWS = 1024
"""Rows of all sources that are tokenised for an estimate, at most."""
_HUNDREDTHS = 100

Row = tuple[int, ...]
"""Tokens of one row, or of the two of a pair."""


@dataclass(frozen=True, kw_only=True)
class PaddingEstimate:
    """The share of a batch's tokens that would be padding."""

    share: float
    num_rows: int
    """How many were tokenised for it."""
    is_whole: bool
    """Whether they are all rows: then the run prints the same share."""


def estimate_padding(
    data: AutoData,
    tokenizer: tokenizers.Tokenizer,
    *,
    template: ChatTemplate | None,
    sequence_length: int,
    batch: Batch,
    num_steps: int,
    seed: int,
    equal_shapes: bool,
) -> PaddingEstimate | None:
    """Return the padding of the first steps of a run that does not pack its rows.

    Args:
        data: of the run.
        tokenizer: of the data.
        template: from :meth:`AutoData.plan_template`.
        sequence_length: of the job.
        batch: of a step.
        num_steps: of the run; 0 if only ranks know.
        seed: of the job.
        equal_shapes: whether all rows are padded to the sequence length.

    Returns:
        ``None`` if some of the data is not on this machine yet, or gives no row.
    """
    sources = data.sources(fetches=False)
    if len(sources) < len(data.entries("path")):
        return None
    sampler = _Sampler(data, tokenizer, template, sequence_length=sequence_length, num_sources=len(sources))
    samples = [sampler.sample(source) for source in sources]
    if not all(sample.rows for sample in samples):
        return None
    rows = [row for sample in samples for row in sample.rows]
    is_whole = all(sample.is_whole for sample in samples)
    if equal_shapes and is_whole:
        lengths = [length for row in rows for length in row]
        share = 1 - sum(lengths) / (len(lengths) * sequence_length)
        return PaddingEstimate(share=share, num_rows=sampler.num_read, is_whole=True)
    order = _order(data, samples, rows=rows, is_whole=is_whole, sorts=not equal_shapes)
    # some rows say what to expect of steps on average; all rows, what the first steps have
    most = PADDING_STEPS if is_whole else max(PADDING_STEPS, -(-SORTED_ROWS // batch.global_batch))
    shares = []
    for step in range(min(most, num_steps or most)):
        first = step * batch.global_batch
        real = whole = 0
        for start in range(first, first + batch.global_batch, batch.micro_batch):
            numbers = (order.index(seed, position) for position in range(start, start + batch.micro_batch))
            lengths = [length for number in numbers for length in rows[number]]
            real += sum(lengths)
            whole += len(lengths) * (sequence_length if equal_shapes else padded_length(lengths))
        shares.append(1 - real / whole)
    return PaddingEstimate(share=sum(shares) / len(shares), num_rows=sampler.num_read, is_whole=is_whole)


def _order(
    data: AutoData, samples: Sequence[_Sample], *, rows: Sequence[Row], is_whole: bool, sorts: bool
) -> SampleOrder:
    """Return the order of the run, or one that draws some rows again and again in its way."""
    sizes = [len(sample.rows) for sample in samples]
    order: SampleOrder = Shuffled(len(rows))
    if data.weights or not is_whole:
        order = Mixture(sizes, exact_weights(data.weights or _shares(samples)))
    if not sorts:
        return order
    epoch = len(rows) if is_whole and not data.weights else None
    of_sources = sizes if data.weights else [len(rows)]
    return ByLength(order, lambda number: max(rows[number]), sizes=of_sources, epoch=epoch)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    rows: Sequence[Row]
    is_whole: bool
    size: float
    """About how many rows the source has."""


def _shares(samples: Sequence[_Sample]) -> list[float]:
    """Return about which share of all rows each source has, in hundredths."""
    total = sum(sample.size for sample in samples)
    return [max(1.0, round(_HUNDREDTHS * sample.size / total)) for sample in samples]


class _Sampler:
    """Tokenises the first rows of sources, without those that are held out."""

    def __init__(
        self,
        data: AutoData,
        tokenizer: tokenizers.Tokenizer,
        template: ChatTemplate | None,
        *,
        sequence_length: int,
        num_sources: int,
    ) -> None:
        self._data, self._template, self._length = data, template, sequence_length
        self._encoder = ExampleEncoder(tokenizer, end_id=None)
        self._most_rows = max(1, _MOST_ROWS // num_sources)
        self._most_chars = SMALL_CHARS // num_sources
        self.num_read = 0

    def sample(self, source: DataSource) -> _Sample:
        examples: list[Example] = []
        num_chars, is_whole = 0, True
        for example in self._documents(source) if source.is_documents else source.examples(self._template):
            if len(examples) == self._most_rows or num_chars >= self._most_chars:
                is_whole = False
                break
            examples.append(example)
            num_chars += sum(len(text.text) for text in texts_of(example))
        self.num_read += len(examples)
        share = 0.0 if self._data.eval_path else self._data.held_out
        held_out = set(held_out_numbers(len(examples), share)) if is_whole else set()
        kept = [example for number, example in enumerate(examples) if number not in held_out]
        rows = list((self._pieces if source.is_documents else self._fitting)(self._tokens(kept)))
        num_read = source.num_rows
        if num_read is None:  # as many as there are bytes for, in a large source or in text
            num_bytes = sum(file.path.stat().st_size for file in source.files)
            num_read = round(len(examples) * max(1.0, num_bytes / max(1, num_chars)))
        return _Sample(rows=rows, is_whole=is_whole, size=len(rows) * num_read / max(1, len(examples)))

    def _documents(self, source: DataSource) -> Iterator[RenderedExample]:
        """Yield documents; of a long one, its beginning."""
        pieces: list[str] = []
        for chunk in source.documents():
            pieces.append(chunk.text)
            if chunk.ends_document or sum(map(len, pieces)) >= self._most_chars:
                yield RenderedExample((TextSegment("".join(pieces), True),))
                pieces = []

    def _tokens(self, examples: Sequence[Example]) -> Iterator[list[int]]:
        """Yield how many tokens the texts of each example have, with their end."""
        with without_threads():
            counts = iter(self._encoder.count_tokens([text for example in examples for text in texts_of(example)]))
        for example in examples:
            yield [next(counts) + (not text.has_special_tokens) for text in texts_of(example)]

    def _fitting(self, examples: Iterable[list[int]]) -> Iterator[Row]:
        """Yield the rows of examples; the last token is a label alone."""
        for counts in examples:
            if self._data.on_long != "drop" or max(counts) <= self._length + 1:
                yield tuple(max(1, min(count - 1, self._length)) for count in counts)

    def _pieces(self, documents: Iterable[list[int]]) -> Iterator[Row]:
        """Yield the pieces of documents."""
        for (count,) in documents:
            for start in range(0, count - 1, self._length):
                yield (min(count - 1 - start, self._length),)
