"""The quantization group: methods, and the manifest of a folder of quantized weights."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from launcher.config.component import Component
from launcher.errors import ConfigError
from launcher.utils.files import write_json
from launcher.utils.schema import build, to_tree


@dataclass(frozen=True, kw_only=True)
class Quantization(Component):
    """Format of the matrices in a model's blocks.

    Embeddings, norms, biases and the output head stay.
    """

    group: ClassVar[str] = "quantization"

    package: ClassVar[str | None] = None
    """The package that it needs."""

    bytes_per_weight: ClassVar[float]
    """Bytes of one weight with its share of the scales."""

    is_differentiable: ClassVar[bool] = True
    """Whether gradients pass through the layers, so that adapters can be trained on them."""

    skip: tuple[str, ...] = ()
    """Layers not to quantize, as name patterns: ``*.mlp.down_proj``, ``transformer.h.0.*``."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject patterns that are none."""
        if "" in self.skip:
            yield self.error("skip", "an empty pattern matches no layer", "leave it out")

    def validate_machine(self, option: str) -> Iterator[ConfigError]:
        """Yield a package that is not installed.

        Args:
            option: by which this method was chosen, as the user types it.
        """
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            fix = f"pip install 'launcher[quantize]', or set {option}=none"
            yield ConfigError(option, self.kind, why=f"the package {self.package} is not installed", fix=fix)


@dataclass(frozen=True, kw_only=True)
class NoQuantization(Component):
    """Weights stay in the format of ``precision``."""

    group: ClassVar[str] = "quantization"
    kind: ClassVar[str] = "none"


QuantizationName = Literal["none", "int8_dynamic", "int8_weight", "int4_weight", "fp8", "nf4"]
"""Values of ``model.quantization``."""


@dataclass(frozen=True, kw_only=True)
class Int8Dynamic(Quantization):
    """8-bit matrices, a scale per output, times 8-bit activations, a scale per token (torchao)."""

    kind: ClassVar[str] = "int8_dynamic"
    bytes_per_weight: ClassVar[float] = 1.0
    is_differentiable: ClassVar[bool] = False
    package: ClassVar[str | None] = "torchao"


@dataclass(frozen=True, kw_only=True)
class Int8Weight(Quantization):
    """8-bit matrices, a scale per output; products in the format of ``precision`` (torchao)."""

    kind: ClassVar[str] = "int8_weight"
    bytes_per_weight: ClassVar[float] = 1.0
    package: ClassVar[str | None] = "torchao"


@dataclass(frozen=True, kw_only=True)
class Int4Weight(Quantization):
    """4-bit matrices, a scale and zero point per group; products in the format of ``precision``."""

    kind: ClassVar[str] = "int4_weight"
    bytes_per_weight: ClassVar[float] = 0.6
    summary_fields: ClassVar[tuple[str, ...]] = ("group_size",)

    group_size: int = 32
    """Inputs that share a scale; it divides the width of every layer that is quantized."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject groups that fill no bytes."""
        yield from super().validate()
        if self.group_size < 2 or self.group_size % 2:
            yield self.error("group_size", "two weights share a byte", "set quantization.group_size=32")


@dataclass(frozen=True, kw_only=True)
class Fp8Weight(Quantization):
    """float8 (e4m3) matrices, a scale per output; products in the format of ``precision``.

    By torchao.
    """

    kind: ClassVar[str] = "fp8"
    bytes_per_weight: ClassVar[float] = 1.0
    package: ClassVar[str | None] = "torchao"


@dataclass(frozen=True, kw_only=True)
class Nf4(Quantization):
    """4-bit NormalFloat, a scale per 64 weights (arXiv:2305.14314; bitsandbytes)."""

    kind: ClassVar[str] = "nf4"
    bytes_per_weight: ClassVar[float] = 0.5625
    package: ClassVar[str | None] = "bitsandbytes"


METHODS: Mapping[str, type[Quantization]] = {
    method.kind: method for method in (Int8Dynamic, Int8Weight, Int4Weight, Fp8Weight, Nf4)
}
"""Classes by the name that they have in options and files."""


def method_named(name: QuantizationName) -> Quantization | None:
    """Return a method with its defaults; ``None`` for ``none``."""
    return None if name == "none" else METHODS[name]()


MANIFEST_FILE = "quantization.json"


@dataclass(frozen=True, kw_only=True)
class QuantizationManifest:
    """How the weights in a folder were quantized."""

    method: Quantization
    layers: tuple[str, ...]
    """Names of the layers that are."""

    def write(self, folder: Path) -> None:
        """Write it into the folder."""
        tree = to_tree(self.method)
        write_json(folder / MANIFEST_FILE, {**tree, "kind": self.method.kind, "layers": list(self.layers)})


def read_manifest(folder: Path) -> QuantizationManifest | None:
    """Return a folder's manifest; ``None`` if the launcher did not quantize its weights.

    Raises:
        ConfigError: the file is there, and not as the launcher writes it.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return _manifest_from_tree(tree)
    except (ValueError, KeyError, TypeError) as error:
        fix = "quantize the model again: job=quantize"
        raise ConfigError(
            "model.weights", str(folder), why=f"its {MANIFEST_FILE} cannot be read: {error}", fix=fix
        ) from error


def _manifest_from_tree(tree: Mapping[str, Any]) -> QuantizationManifest:
    options = {name: value for name, value in tree.items() if name not in ("kind", "layers")}
    mistakes: list[ConfigError] = []
    method = build(METHODS[tree["kind"]], options, path="quantization", report=mistakes.append)
    layers = tree["layers"]
    if method is None or not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise ValueError("; ".join(map(str, mistakes)) or "layers is not a list of names")
    return QuantizationManifest(method=method, layers=tuple(layers))
