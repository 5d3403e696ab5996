"""The processor of an image-text model: from a conversation and its images to inputs.

Images are preprocessed by Pillow and numpy, so the result does not depend on whether torchvision is installed. Videos
are left out: their processors need it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.config.model.image_text import PROCESSOR_FILES, read_image_text
from launcher.errors import ConfigError
from launcher.utils.files import exists, read_object, sha256_of

if TYPE_CHECKING:
    import tokenizers
    from PIL import Image
    from transformers import ProcessorMixin

PER_TOKEN = frozenset({"mm_token_type_ids", "token_type_ids"})
"""Inputs with one value for each token, (sequences, tokens); the others are of images."""
_TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "text_replacement_offsets"})
_NAMED_IN = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
"""Files that may name the class of the processor, in Transformers' order."""
_PARTS = ("image_processor", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """What the processor writes in the text for one image."""

    start: int
    """Where the image token stands in the text before."""
    text: str
    """The tokens of the image, as text."""


@dataclass(frozen=True, kw_only=True)
class ImageTextInputs:
    """What a model takes for one sequence."""

    input_ids: list[int]
    """With one token for each place that an image takes."""
    arrays: Mapping[str, np.ndarray]
    """Further inputs by the names of the model's ``forward``: pixels, grids, types of tokens."""
    replacements: tuple[Replacement, ...]
    """Of each image, in order."""


class ImageTextProcessor:
    """A model's own processor, for images and text.

    Args:
        inner: of Transformers.
        fingerprint: changes with the files that it was loaded from.
    """

    def __init__(self, inner: ProcessorMixin, fingerprint: str) -> None:
        self._inner, self.fingerprint = inner, fingerprint
        self.image_token: str = inner.image_token
        """What a chat template writes once for each image."""

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer, which knows the tokens of images."""
        inner: tokenizers.Tokenizer = self._inner.tokenizer.backend_tokenizer
        return inner

    def begins_itself(self, text: str) -> bool:
        """Return whether a text holds its special tokens, by the rule of Transformers' processors."""
        begin = self._inner.tokenizer.bos_token
        return begin is not None and text.startswith(begin)

    def inputs(self, text: str, images: Sequence[Image.Image] = ()) -> ImageTextInputs:
        """Return the inputs for a rendered conversation with its images.

        Special tokens are put around the text unless it begins with the token that begins texts, as Transformers'
        processors do with rendered conversations.

        Args:
            text: with one image token for each image.
            images: RGB, in the order of their tokens.

        Raises:
            ValueError: the number of image tokens in the text is another.
        """
        if (found := text.count(self.image_token)) != len(images):
            raise ValueError(f"its text holds {found} × {self.image_token}, and there are {len(images)} images")
        options: dict[str, Any] = {"return_text_replacement_offsets": True} if images else {}
        if self.begins_itself(text):
            options["add_special_tokens"] = False
        if images:
            options |= {"images": [list(images)], "images_kwargs": {"return_tensors": "np"}}
        made = self._inner(text=[text], **options)
        offsets = made.get("text_replacement_offsets") or [[]]
        replaced = tuple(Replacement(start=one["span"][0], text=one["replacement"]) for one in offsets[0])
        if len(replaced) != len(images):
            raise ValueError(f"{type(self._inner).__name__} does not say what it writes for an image")
        arrays = {name: _as_model_takes(value) for name, value in made.items() if name not in _TEXT_INPUTS}
        ids = [int(token) for token in made["input_ids"][0]]
        return ImageTextInputs(input_ids=ids, arrays=arrays, replacements=replaced)


def _as_model_takes(value: Any) -> np.ndarray:
    """Return an array whose numbers are no wider than those of weights in fp32."""
    array: np.ndarray = np.asarray(value)
    found: np.ndarray = array.astype(np.float32) if array.dtype == np.float64 else array
    return found


def load_processor(folder: Path, *, option: str) -> ImageTextProcessor:
    """Return the processor of a model folder, on the backend of Pillow. Imports Transformers.

    Code that comes with the model is never run.

    Args:
        folder: with config.json, the tokenizer and the files of the processor.
        option: that chose it, for messages.

    Raises:
        ConfigError: it holds none for images, or one that Transformers cannot load.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    fix = "choose a folder with preprocessor_config.json or processor_config.json, as save_pretrained writes"
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        inner = _assembled(folder, image_processor, tokenizer)
    except Exception as error:  # of damaged files, and of packages that a family's processor needs
        said = " ".join(line.strip() for line in f"{type(error).__name__}: {error}".strip().splitlines()[:2])
        why = f"Transformers cannot load the processor in {folder}: {said}"
        raise ConfigError(option, folder, why=why, fix=fix) from error
    facts = read_image_text(folder)
    if getattr(inner, "image_token", None) is None or (facts is not None and facts.token != inner.image_token):
        written = getattr(inner, "image_token", None)
        why = f"{type(inner).__name__} writes {written} for an image, and config.json names the token "
        why += f"{'' if facts is None else facts.token}"
        raise ConfigError(option, folder, why=why, fix="choose a model such as LLaVA, Idefics3, SmolVLM or Qwen2-VL")
    return ImageTextProcessor(inner, processor_fingerprint(folder))


def processor_fingerprint(folder: Path) -> str:
    """Return a hash of what decides the pixels: the processor's files and its libraries."""
    import PIL
    import transformers

    files = {name: (folder / name).read_text("utf-8") for name in PROCESSOR_FILES[:2] if exists(folder / name)}
    return sha256_of(json.dumps([transformers.__version__, PIL.__version__, sorted(files.items())]).encode())


def _assembled(folder: Path, image_processor: Any, tokenizer: Any) -> ProcessorMixin:
    """Return the processor of a folder from its parts, without the one for videos."""
    family = _processor_class(folder)
    if any("video" in name for name in family.get_attributes()):
        family = type(family.__name__, (family,), {"get_attributes": classmethod(lambda cls: list(_PARTS))})
    settings, _ = family.get_processor_dict(str(folder))
    taken = inspect.signature(family.__init__).parameters
    options = {name: value for name, value in settings.items() if name in taken and name not in _PARTS}
    options |= {name: None for name in taken if name == "video_processor"}
    return family(image_processor=image_processor, tokenizer=tokenizer, **options)


def _processor_class(folder: Path) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    for name in _NAMED_IN:
        try:
            named = read_object(folder / name).get("processor_class")
        except (OSError, ValueError):
            continue
        if isinstance(named, str) and (found := processor_class_from_name(named)) is not None:
            return found
    return PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder, trust_remote_code=False))]


def join_arrays(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the arrays of several sequences as one, along the first axis.

    Where later axes differ (the number of an image's tiles, say), smaller arrays are filled up with zeros, which
    processors and models take for what is not there.
    """
    sizes = tuple(max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim))
    if all(part.shape[1:] == sizes for part in parts):
        whole: np.ndarray = np.concatenate(parts)
        return whole
    whole = np.zeros((sum(len(part) for part in parts), *sizes), parts[0].dtype)
    first = 0
    for part in parts:
        place = (slice(first, first + len(part)), *(slice(0, size) for size in part.shape[1:]))
        whole[place] = part
        first += len(part)
    return whole


def pad_per_token(parts: Sequence[np.ndarray | None], *, length: int) -> np.ndarray:
    """Return values for each token, (sequences, length), with zeros where there are none.

    Args:
        parts: of each sequence, (tokens,); ``None`` is zeros.
        length: of the result; values beyond it are left out.
    """
    whole: np.ndarray = np.zeros((len(parts), length), np.int64)
    for number, part in enumerate(parts):
        if part is not None:
            whole[number, : min(length, len(part))] = part[:length]
    return whole
