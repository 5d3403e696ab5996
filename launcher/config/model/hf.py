"""Any language model that Transformers knows, with images or not, of the hub or a folder."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from launcher.config.model.base import Model, has_tokenizer
from launcher.config.model.config_json import Sizes, shape_from_tensors, sizes_from_config
from launcher.config.model.folder import (
    has_separate_head,
    read_config,
    tensor_shapes,
    validate_config_json,
    validate_model_folder,
)
from launcher.config.model.image_text import ImageText, read_image_text
from launcher.config.model.shape import LlamaSizes, Shape
from launcher.config.paths import PathText
from launcher.errors import ConfigError
from launcher.utils.files import exists, is_folder
from launcher.utils.hub import cached_folder, validate_hub_name


@dataclass(frozen=True, kw_only=True)
class Hf(Model):
    """A model of the hub (``org/model``) or a local folder.

    Code shipped with a model is never run.
    """

    kind: ClassVar[str] = "hf"

    name: PathText
    """A hub name (``org/model``), or a local folder."""

    weights: PathText = "pretrained"
    """``pretrained``, ``random`` (same architecture, untrained) or a folder of weights.
    A folder is of safetensors, or a run or checkpoint, also of another program."""

    def shape(self) -> Shape | None:
        """Return the sizes where a config is on this machine and of a family that is known exactly."""
        sizes = self._sizes()
        if sizes:
            return sizes.shape()
        folder = self.local_weights or (cached_folder(self.name) if self.weights == "pretrained" else None)
        return _measured(folder, _stamp(folder)) if folder is not None else None

    def family(self) -> str | None:
        """Return the ``model_type`` of the config where it is on this machine."""
        config = self.stored_config()
        return None if config is None else str(config.get("model_type"))

    def image_text(self) -> ImageText | None:
        """Return what the files say about images, of the weights' folder where it has a tokenizer."""
        config = self.stored_config()
        if config is None:
            return None
        weights = self.local_weights
        if weights is not None and has_tokenizer(weights):
            return read_image_text(weights, config)
        folder = Path(self.name).expanduser() if self.is_local else cached_folder(self.name)
        return None if folder is None else read_image_text(folder, config)

    def architecture(self) -> dict[str, Any]:
        """Return the sizes that decide the parameters' shapes, or the name if they are unknown."""
        sizes = self._sizes()
        return sizes.architecture() if sizes else {"family": "hf", "name": last_part(self.name)}

    @property
    def local_weights(self) -> Path | None:
        """The folder of weights that the user named, as weights or as the model."""
        named_folder = self.weights == "pretrained" and self.is_local
        return Path(self.name).expanduser() if named_folder else super().local_weights

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield a local folder that is missing or holds no model, and names that can be neither."""
        if self.is_local:
            yield from self._validate_local()
        elif problem := validate_hub_name(
            "model.name", self.name, holds="a model (config.json)", is_such=is_model_folder, instead="a hub name"
        ):
            yield problem
        if self.weights not in ("random", "pretrained"):
            sizes = self._sizes()
            architecture = sizes.architecture() if sizes else None
            yield from validate_model_folder("model.weights", self.weights, architecture=architecture)

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether the folder of the weights or model has a tokenizer; hub models are assumed to."""
        if self.weights not in ("random", "pretrained") and has_tokenizer(Path(self.weights).expanduser()):
            return True
        return has_tokenizer(Path(self.name).expanduser()) if self.is_local else True

    def pretrained_source(self) -> Path | str:
        """Return the local folder, or the name on the hub."""
        return Path(self.name).expanduser() if self.is_local else self.name

    @property
    def is_local(self) -> bool:
        """Whether ``name`` is a local folder rather than a name on the hub."""
        return self.name.startswith(("/", "./", "../", "~")) or self.name in (".", "..") or is_folder(Path(self.name))

    def stored_config(self) -> dict[str, Any] | None:
        """Return the config of the folder or of the hub's cache, where it can be read."""
        folder = Path(self.name).expanduser() if self.is_local else cached_folder(self.name)
        if folder is None:
            return None
        try:
            return read_config(folder)
        except (OSError, ValueError):  # validate_machine says so
            return None

    def _sizes(self) -> Sizes | None:
        config = self.stored_config()
        sizes = None if config is None else sizes_from_config(config)
        if sizes is None or not sizes.shape().tie_word_embeddings:
            return sizes
        folder = self.local_weights or (cached_folder(self.name) if self.weights == "pretrained" else None)
        if folder is None or not _has_separate_head(folder, _stamp(folder)):
            return sizes
        return replace(sizes, tie_word_embeddings=False) if isinstance(sizes, LlamaSizes) else None

    def _validate_local(self) -> Iterator[ConfigError]:
        if self.weights == "pretrained":
            yield from validate_model_folder("model.name", self.name, architecture=None)
            return
        try:
            config = read_config(Path(self.name).expanduser())
        except (OSError, ValueError) as error:
            yield self.error("name", f"has no readable config.json: {error}", "give a model folder or a hub name")
            return
        yield from validate_config_json("model.name", self.name, config)


def last_part(name: str) -> str:
    """Return the last part of a hub name or path, which stays the same in other spellings."""
    return Path(os.path.abspath(os.path.expanduser(name))).name or name  # noqa: PTH100, PTH111 (links stay)


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder says what model it holds."""
    return exists(folder / "config.json")


@functools.cache
def _measured(folder: Path, stamp: int) -> Shape | None:
    """Return the sizes from a folder's config and weights; ``stamp`` changes with the weights."""
    try:
        return shape_from_tensors(read_config(folder), tensor_shapes(folder))
    except (OSError, ValueError):  # validate_machine says so
        return None


@functools.cache
def _has_separate_head(folder: Path, stamp: int) -> bool:
    """Return whether the weights in a folder have a head apart; ``stamp`` changes when they do."""
    try:
        return has_separate_head(folder)
    except (OSError, ValueError):  # validate_machine says so
        return False


def _stamp(folder: Path) -> int:
    """Return when the newest file of a folder was written."""
    try:
        return max((file.stat().st_mtime_ns for file in folder.iterdir()), default=0)
    except OSError:  # validate_machine says so
        return 0
