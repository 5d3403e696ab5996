"""Rendered training examples: text in segments, each with or without loss, and their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import tokenizers

    from launcher.config.data.images import EncodedImage

OnLong = Literal["refuse", "truncate", "drop"]


@dataclass(frozen=True, slots=True)
class TextSegment:
    """A piece of an example's text."""

    text: str
    is_trained: bool
    """Whether the loss counts its tokens."""


@dataclass(frozen=True, slots=True)
class RenderedExample:
    """One training sequence as text, in the order of the tokens."""

    segments: tuple[TextSegment, ...]
    has_special_tokens: bool = False
    """Whether the text holds its special tokens, as chat templates write them.
    Otherwise the tokenizer's beginning and end of text are put around it."""
    images: tuple[EncodedImage, ...] = ()
    """In the order of their places in the text, each of which holds the model's image token."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(segment.text for segment in self.segments)

    @property
    def ends_trained(self) -> bool:
        """Whether the loss counts the end of the text."""
        return next((one.is_trained for one in reversed(self.segments) if one.text), False)

    def trained_spans(self) -> Iterator[tuple[int, int]]:
        """Yield first and last + 1 character of each run of trained text."""
        position, start = 0, None
        for segment in self.segments:
            if segment.is_trained and segment.text:
                start = position if start is None else start
            elif segment.text and start is not None:
                yield start, position
                start = None
            position += len(segment.text)
        if start is not None:
            yield start, position


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt with a preferred and a rejected answer."""

    prompt: RenderedExample
    """Without loss."""
    chosen: RenderedExample
    """The prompt without loss, then the preferred answer with loss."""
    rejected: RenderedExample
    """The prompt without loss, then the other answer with loss."""


Example = RenderedExample | PreferencePair


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """The tokens of an example."""

    ids: tuple[int, ...]
    is_trained: tuple[bool, ...]
    """For each token whether it is a label that the loss counts."""

    @property
    def num_trained(self) -> int:
        """Number of tokens that the loss counts."""
        return sum(self.is_trained)


class ExampleEncoder:
    """Turns rendered examples into tokens with a mask of those that are trained.

    A token is trained where its characters overlap a trained segment; the text is encoded once, as a whole, so the
    tokens are those that a prompt of this text has.

    Args:
        tokenizer: is copied where its offsets leave spaces out.
        end_id: token that ends an example whose text has no special tokens; ``None`` where there is none.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, end_id: int | None) -> None:
        self._tokenizer, self._end_id = _with_exact_offsets(tokenizer), end_id

    def encode(self, example: RenderedExample) -> EncodedExample:
        """Return the tokens of one example."""
        text, special = example.text, not example.has_special_tokens
        return self._marked(example, self._tokenizer.encode(text, add_special_tokens=special))

    def encode_batch(self, examples: Sequence[RenderedExample]) -> list[EncodedExample]:
        """Return the tokens of several examples, computed on all cores the process may use."""
        encodings = _encodings(self._tokenizer.encode_batch, examples)
        return [self._marked(one, encoding) for one, encoding in zip(examples, encodings, strict=True)]

    def count_tokens(self, examples: Sequence[RenderedExample]) -> list[int]:
        """Return how many tokens each example has, without an end that is not written yet."""
        return list(map(len, encode_texts(self._tokenizer, examples)))

    def pieces(self, example: RenderedExample) -> Iterator[tuple[str, bool]]:
        """Yield the text of an example in pieces: whether the loss counts the tokens of each."""
        text, special = example.text, not example.has_special_tokens
        encoding = self._tokenizer.encode(text, add_special_tokens=special)
        marks = self._marked(example, encoding).is_trained
        position, start, before = 0, 0, False
        for (first, stop), is_trained in zip(encoding.offsets, marks, strict=False):
            if stop <= position and first <= position and stop != first:
                continue  # another byte of the character before
            if is_trained is not before:
                if position > start:
                    yield text[start:position], before
                start, before = position, is_trained
            position = max(position, stop)
        yield text[start:], before

    def _marked(self, example: RenderedExample, encoding: Any) -> EncodedExample:
        ids: list[int] = encoding.ids
        is_trained = [False] * len(ids)
        for start, stop in example.trained_spans():
            first, last = _tokens_of(encoding, start, stop)
            is_trained[first:last] = [True] * (last - first)
        if not example.has_special_tokens and self._end_id is not None:
            if ids[-1:] == [self._end_id]:
                is_trained[-1] = example.ends_trained
            else:
                ids, is_trained = [*ids, self._end_id], [*is_trained, example.ends_trained]
        return EncodedExample(tuple(ids), tuple(is_trained))


def encode_texts(tokenizer: tokenizers.Tokenizer, examples: Sequence[RenderedExample]) -> list[list[int]]:
    """Return the tokens of each example's text, without offsets, in about half of the time."""
    return [encoding.ids for encoding in _encodings(tokenizer.encode_batch_fast, examples)]


def _encodings(encode_batch: Callable[..., list[Any]], examples: Sequence[RenderedExample]) -> list[Any]:
    found: list[Any] = [None] * len(examples)
    for special in (False, True):
        numbers = [number for number, one in enumerate(examples) if one.has_special_tokens is not special]
        texts = [examples[number].text for number in numbers]
        for number, encoding in zip(numbers, encode_batch(texts, add_special_tokens=special), strict=True):
            found[number] = encoding
    return found


def encode_example(
    tokenizer: tokenizers.Tokenizer, example: RenderedExample, *, end_id: int | None = None
) -> EncodedExample:
    """Return the tokens of one example; :class:`ExampleEncoder` encodes many."""
    return ExampleEncoder(tokenizer, end_id=end_id).encode(example)


def fit_example(example: EncodedExample, max_tokens: int, on_long: OnLong) -> EncodedExample | None:
    """Return an example of at most ``max_tokens`` tokens; ``None`` where it is left out.

    Args:
        example: what has to fit.
        max_tokens: labels and the token before the first one, so the sequence length + 1.
        on_long: ``truncate`` cuts the end off; an example without a trained token left is left out.

    Raises:
        ValueError: it is longer and ``on_long`` is ``refuse``.
    """
    if len(example.ids) <= max_tokens:
        return example
    if on_long == "refuse":
        raise ValueError(f"has {len(example.ids):,} tokens, and a sequence takes {max_tokens:,}")
    if on_long == "drop" or not any(example.is_trained[1:max_tokens]):
        return None
    return EncodedExample(example.ids[:max_tokens], example.is_trained[:max_tokens])


def joined(segments: Iterable[TextSegment]) -> tuple[TextSegment, ...]:
    """Return the same text in as few segments as possible."""
    found: list[TextSegment] = []
    for segment in segments:
        if not segment.text:
            continue
        if found and found[-1].is_trained is segment.is_trained:
            found[-1] = TextSegment(found[-1].text + segment.text, segment.is_trained)
        else:
            found.append(segment)
    return tuple(found)


def _tokens_of(encoding: Any, start: int, stop: int) -> tuple[int, int]:
    """Return the range of tokens that overlap characters ``start`` to ``stop``.

    A character that a normalizer removed belongs to no token.
    """
    first = next((at for place in range(start, stop) if (at := encoding.char_to_token(place)) is not None), None)
    if first is None:
        return 0, 0
    last = next(at for place in range(stop - 1, start - 1, -1) if (at := encoding.char_to_token(place)) is not None)
    while last + 1 < len(encoding.ids) and (span := encoding.token_to_chars(last + 1)) and span[0] < stop:
        last += 1  # the other bytes of the last character
    return first, last + 1


def _with_exact_offsets(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer whose offsets hold the spaces that belong to tokens."""
    from tokenizers import Tokenizer

    if tokenizer.post_processor is None or b'"trim_offsets":true' not in tokenizer.post_processor.__getstate__():
        return tokenizer
    tree = json.loads(tokenizer.to_str())
    _keep_spaces(tree["post_processor"])
    return Tokenizer.from_str(json.dumps(tree))


def _keep_spaces(tree: Any) -> None:
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _keep_spaces(part)
    if isinstance(tree, dict) and "trim_offsets" in tree:
        tree["trim_offsets"] = False
