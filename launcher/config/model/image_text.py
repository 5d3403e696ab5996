"""Whether a folder holds an image-text model, and its image token, from its files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.model.transformers_support import image_text_types
from launcher.utils.files import exists, read_object

PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    "chat_template.json",
)
"""Files of a model's processor in its folder, besides those of its tokenizer."""

_TOKEN_KEYS = ("image_token_id", "image_token_index")
"""Keys of ``config.json`` for the number of the image token; the second is the older name."""


@dataclass(frozen=True, kw_only=True)
class ImageText:
    """What the files of a model say about its images."""

    family: str
    """The ``model_type``."""
    token_id: int
    """Number of the token that is repeated in the input where an image stands."""
    token: str
    """Its text, which a chat template writes once for each image; empty where no file names it."""
    processor: Path | None
    """The folder with the files of the processor; ``None`` where it holds none."""


def is_image_text(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` describes a decoder that takes images and text.

    Some families are one name for models with and without images: those with images have a ``vision_config``.
    """
    known = image_text_types()
    is_known = known is None or config.get("model_type") in known
    has_parts = isinstance(config.get("vision_config"), Mapping) and _token_id(config) is not None
    return is_known and has_parts and not config.get("is_encoder_decoder")


def read_image_text(folder: Path, config: Mapping[str, Any] | None = None) -> ImageText | None:
    """Return what a folder says; ``None`` of a text model, and where it cannot be read.

    Args:
        folder: with the tokenizer and, if it holds one, the processor.
        config: the content of ``config.json``; by default that of the folder.
    """
    if config is None:
        try:
            config = read_object(folder / "config.json")
        except (OSError, ValueError):
            return None
    if not is_image_text(config):
        return None
    token_id = _token_id(config)
    assert token_id is not None, "an image-text model has one"
    return ImageText(
        family=str(config["model_type"]),
        token_id=token_id,
        token=_token_text(folder, token_id),
        processor=folder if has_processor(folder) else None,
    )


def has_processor(folder: Path) -> bool:
    """Return whether a folder says how images are preprocessed."""
    return any(exists(folder / name) for name in PROCESSOR_FILES[:2])


def _token_id(config: Mapping[str, Any]) -> int | None:
    found = (config.get(key) for key in _TOKEN_KEYS)
    return next((value for value in found if type(value) is int and value >= 0), None)


def _token_text(folder: Path, token_id: int) -> str:
    """Return the text of a token, from ``tokenizer.json``; without that file, from the settings."""
    try:
        tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = {token["id"]: str(token["content"]) for token in tree.get("added_tokens") or []}
        if token_id in added:
            return added[token_id]
        vocabulary = tree["model"]["vocab"]
        names = (
            vocabulary.items() if isinstance(vocabulary, dict) else ((one[0], at) for at, one in enumerate(vocabulary))
        )
        return next((str(name) for name, number in names if number == token_id), "")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    for name in ("processor_config.json", "tokenizer_config.json"):
        try:
            found = read_object(folder / name).get("image_token")
        except (OSError, ValueError):
            continue
        if isinstance(found, str):
            return found
    return ""
