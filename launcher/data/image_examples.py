"""Examples with images: tokens and pixels, as the model's processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from launcher.config.data.examples import RenderedExample, TextSegment, joined
from launcher.config.data.images import EncodedImage, decode, image_hash
from launcher.data.image_store import ImageStamp, pack_arrays
from launcher.errors import EXIT_BAD_INPUT, JobError
from launcher.models.processor import PER_TOKEN, ImageTextInputs, ImageTextProcessor, Replacement

_FILLER_SIZE = 32
"""Pixels on each side of the blank image that stands in for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedExample:
    """An example as text that holds one token for each place of its images."""

    example: RenderedExample
    input_ids: tuple[int, ...] = ()
    """Tokens that the processor made; empty where it was not asked."""
    arrays: bytes = b""
    """Further inputs of the model, of :func:`pack_arrays`; empty without images."""
    stamps: tuple[ImageStamp, ...] = ()

    def check(self, ids: Sequence[int]) -> None:
        """Raise where tokens differ from those of the processor, for which the pixels are.

        Raises:
            JobError: they do.
        """
        if self.input_ids and tuple(ids) != self.input_ids:
            why = f"the tokenizer makes other tokens of {self.example.text[:80]!r} than the model's processor"
            raise JobError(why, exit_code=EXIT_BAD_INPUT)


class ExamplePreparer:
    """Writes the tokens of images into examples, and preprocesses the images.

    Args:
        processor: of the model.
    """

    def __init__(self, processor: ImageTextProcessor) -> None:
        self._processor = processor
        self._around = _special_text_around(processor)

    def prepare(self, example: RenderedExample) -> PreparedExample:
        """Return one example; text that is no conversation stays as it is.

        Raises:
            BadImage: an image cannot be decoded.
        """
        if not example.has_special_tokens:
            assert not example.images, "only a chat template places images"
            return PreparedExample(example=example)
        read = [(image, image.read()) for image in example.images]
        pixels = [decode(raw, name=image.name, limits=image.limits) for image, raw in read]
        made = self._processor.inputs(example.text, pixels)
        return PreparedExample(
            example=replace(example, segments=self._segments(example, made.replacements), images=()),
            input_ids=tuple(made.input_ids),
            arrays=pack_arrays(_of_one_sequence(made)) if pixels else b"",
            stamps=tuple(_stamp(image, raw) for image, raw in read if image.path is not None),
        )

    def filler(self) -> bytes:
        """Return the inputs of a sequence with one blank image, for batches that have none."""
        from PIL import Image

        blank = Image.new("RGB", (_FILLER_SIZE, _FILLER_SIZE), (127, 127, 127))
        made = self._processor.inputs(self._processor.image_token, [blank])
        return pack_arrays({"input_ids": np.array(made.input_ids, np.int64), **_of_one_sequence(made)})

    def _segments(self, example: RenderedExample, replacements: Sequence[Replacement]) -> tuple[TextSegment, ...]:
        """Return the segments with the text of each image in its place, which the loss never counts."""
        token, rest = self._processor.image_token, iter(replacements)
        before, after = ("", "") if self._processor.begins_itself(example.text) else self._around
        found = [TextSegment(before, False)]
        for segment in example.segments:
            pieces = segment.text.split(token)
            found.append(TextSegment(pieces[0], segment.is_trained))
            for piece in pieces[1:]:
                found += [TextSegment(next(rest).text, False), TextSegment(piece, segment.is_trained)]
        return joined([*found, TextSegment(after, False)])


def _of_one_sequence(made: ImageTextInputs) -> dict[str, np.ndarray]:
    return {name: value[0] if name in PER_TOKEN else value for name, value in made.arrays.items()}


def _special_text_around(processor: ImageTextProcessor) -> tuple[str, str]:
    """Return the text of the tokens that the tokenizer puts before and after a text."""
    tokenizer = processor.tokenizer
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    at = next((at for at in range(len(whole)) if whole[at : at + len(alone)] == alone), 0)
    before, after = whole[:at], whole[at + len(alone) :]
    texts = ("".join(str(tokenizer.id_to_token(number)) for number in part) for part in (before, after))
    return next(texts), next(texts)


def _stamp(image: EncodedImage, raw: bytes) -> ImageStamp:
    assert image.path is not None, "it is a file"
    status = image.path.stat()
    size, modified_ns = len(raw), status.st_mtime_ns
    return ImageStamp(path=str(image.path), num_bytes=size, modified_ns=modified_ns, sha256=image_hash(raw))
