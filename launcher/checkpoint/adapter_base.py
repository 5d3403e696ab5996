"""What identifies an adapter and the weights that it was trained on."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.adapter import Dora, Lora, Qlora, RsLora
from launcher.config.model.base import Model
from launcher.config.model.folder import weights_fingerprint
from launcher.config.model.hf import Hf
from launcher.errors import ConfigError
from launcher.utils.files import exists
from launcher.utils.schema import build, to_tree
from launcher.utils.text import short_path


@dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """The weights beside which an adapter is trained."""

    name: str
    """Of the model."""
    weights: str
    """``random``, ``pretrained`` or a folder."""
    quantization: str = "none"
    """How they are quantized."""
    seed: int | None = None
    """That random ones are drawn with."""
    fingerprint: str = ""
    """Checksum of their files; empty where they were not on the machine."""

    def __str__(self) -> str:
        where = f"random with job.seed={self.seed}" if self.weights == "random" else short_path(Path(self.weights))
        where = "pretrained" if self.weights == "pretrained" else where
        quantized = "" if self.quantization == "none" else f", {self.quantization}"
        mark = f", {self.fingerprint[:8]}" if self.fingerprint else ""
        return f"{self.name} ({where}{quantized}{mark})"


def base_weights(model: Model, *, seed: int) -> BaseWeights:
    """Return what identifies the weights of a model."""
    is_random = model.weights == "random"
    folder = None if is_random else _folder_of(model)
    return BaseWeights(
        name=model.name,
        weights=model.weights,
        quantization=model.quantization,
        seed=seed if is_random else None,
        fingerprint="" if folder is None else _fingerprint(folder, _stamp(folder)),
    )


def _folder_of(model: Model) -> Path | None:
    try:
        return model.weights_folder()
    except ConfigError:
        return None  # the check of the model reports it


def missing_base(model: Model) -> Path | None:
    """Return the folder that a model names and that is not there; ``None`` if all are."""
    named = [Path(model.name).expanduser()] if isinstance(model, Hf) and model.is_local else []
    weights = [] if model.local_weights is None else [model.local_weights]
    return next((folder.absolute() for folder in (*weights, *named) if not exists(folder)), None)


@functools.cache
def _fingerprint(folder: Path, stamp: int) -> str:
    """Return the checksum of a folder's weights; ``stamp`` changes with its files."""
    try:
        return weights_fingerprint(folder)
    except (OSError, ValueError):
        return ""  # validate_machine reports it


def _stamp(folder: Path) -> int:
    try:
        return max((file.stat().st_mtime_ns for file in folder.iterdir()), default=0)
    except OSError:
        return 0


def is_same_base(one: BaseWeights, other: BaseWeights) -> bool:
    """Return whether two identify the same weights, as far as is known."""
    if (one.weights == "random") != (other.weights == "random"):
        return False
    if one.weights == "random":
        return one.seed == other.seed
    return one.fingerprint == other.fingerprint if one.fingerprint and other.fingerprint else True


_KINDS = {cls.kind: cls for cls in (Lora, RsLora, Dora, Qlora)}
_STRUCTURE = ("r", "alpha", "targets", "modules_to_save", "bias")


def adapter_tree(lora: Lora | None) -> dict[str, Any]:
    """Return an adapter as plain data; empty for none."""
    return {} if lora is None else to_tree(lora) | {"is_dora": lora.is_dora, "is_rslora": lora.is_rslora}


def adapter_from_tree(tree: dict[str, Any]) -> Lora | None:
    """Return the adapter that :func:`adapter_tree` wrote; ``None`` for none or another version."""
    options = {name: value for name, value in tree.items() if name not in ("kind", "is_dora", "is_rslora")}
    cls = _KINDS.get(str(tree.get("kind")))
    return None if cls is None else build(cls, options, path="adapter", report=lambda error: None)


def adapter_differences(written: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return the options in which two adapters differ, of those that decide their results."""
    return [name for name in (*_STRUCTURE, "is_dora", "is_rslora") if written.get(name) != ours.get(name)]
