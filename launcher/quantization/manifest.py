"""What a folder of quantised weights says of itself: the method, its options and the layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError
from launcher.files import write_json
from launcher.quantization.base import Quantization
from launcher.quantization.methods import METHODS
from launcher.schema import build, to_tree

FILE = "quantization.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """How the weights in a folder were quantised."""

    method: Quantization
    layers: tuple[str, ...]
    """Names of the layers that are."""

    def write(self, folder: Path) -> None:
        """Write it into the folder."""
        tree = to_tree(self.method)
        write_json(folder / FILE, {**tree, "kind": self.method.kind, "layers": list(self.layers)})


def read_manifest(folder: Path) -> Manifest | None:
    """Return what a folder says; ``None`` where its weights are not quantised by the launcher.

    Raises:
        ConfigError: the file is there, and not as the launcher writes it.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return _manifest(tree)
    except (ValueError, KeyError, TypeError) as error:
        fix = "quantise the model again: job=quantize"
        raise ConfigError("model.weights", str(folder), why=f"its {FILE} cannot be read: {error}", fix=fix) from error


def _manifest(tree: Mapping[str, Any]) -> Manifest:
    options = {name: value for name, value in tree.items() if name not in ("kind", "layers")}
    mistakes: list[ConfigError] = []
    method = build(METHODS[tree["kind"]], options, path="quantization", report=mistakes.append)
    layers = tree["layers"]
    if method is None or not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise ValueError("; ".join(map(str, mistakes)) or "layers is not a list of names")
    return Manifest(method=method, layers=tuple(layers))
