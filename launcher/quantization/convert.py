"""Quantize a model while it is built, or restore quantized layers from a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from launcher.config.quantization import QuantizationManifest
from launcher.errors import ConfigError
from launcher.quantization.codecs import StoredLayer, codec_of, is_quantized
from launcher.quantization.layers import as_linear, matrix_size, quantized_targets, replace_layer

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.config.quantization import Quantization


class Converter:
    """Quantizes the layers of a model part by part, as soon as each part is filled.

    Args:
        model: laid out, without storage.
        method: what to do.
        option: by which the method was chosen, as the user types it.

    Raises:
        ConfigError: a layer's size does not fit, or the patterns of what to skip match nothing.
    """

    def __init__(self, model: nn.Module, method: Quantization, *, option: str) -> None:
        self._model, self._codec = model, codec_of(method)
        self.names = sorted(quantized_targets(model, method.skip, option=option))
        for name in self.names:
            self._codec.check(name, matrix_size(model.get_submodule(name))[1], option=option)
        self._paths = {name: name for name in self.names}

    def move(self, path: Callable[[str], str]) -> None:
        """Take each layer from where it is now, below an adapter."""
        self._paths = {name: path(name) for name in self.names}

    def convert(self, part: str) -> None:
        """Quantize the layers of one part of the model, which is filled."""
        for name in _within(self.names, part):
            path = self._paths[name]
            replace_layer(self._model, path, self._codec.quantize(as_linear(self._model.get_submodule(path))))

    def check(self) -> None:
        """Raise if a layer was left out; call it after the last part."""
        check_all_quantized(self._model, list(self._paths.values()))


class Restorer:
    """Restores quantized layers of a model from files, part by part.

    Args:
        model: laid out, without storage; its layers lose their matrices.
        manifest: what a folder says of itself.
        folder: the folder.
    """

    def __init__(self, model: nn.Module, manifest: QuantizationManifest, folder: Path) -> None:
        self._model, self._codec = model, codec_of(manifest.method)
        self.names = sorted(manifest.layers)
        self._folder = folder
        self._layers = {name: model.get_submodule(name) for name in self.names}
        self._sizes = {name: matrix_size(layer) for name, layer in self._layers.items()}
        self._paths = {name: name for name in self.names}
        self._mask()

    def _mask(self) -> None:
        for name, path in self._paths.items():
            replace_layer(self._model, path, _Placeholder(self._layers[name]))

    def take_back(self) -> None:
        """Give the model its layers without storage back, to put adapters around them."""
        for name, layer in self._layers.items():
            replace_layer(self._model, name, layer)

    def move(self, path: Callable[[str], str]) -> None:
        """Restore each layer to where it is now, below an adapter."""
        self._paths = {name: path(name) for name in self.names}
        self._mask()

    def owns(self, stored: str) -> bool:
        """Return whether the stored tensor of this name is part of a quantized layer."""
        layer = next((name for name in self.names if stored.startswith(f"{name}.")), None)
        return layer is not None and self._codec.owns(layer, stored)

    def restore(self, part: str, read: Callable[[str], Tensor], metadata: Mapping[str, str]) -> None:
        """Restore the layers of one part, whose biases are filled.

        Raises:
            ConfigError: files lack a part of one.
        """
        for name in _within(self.names, part):
            try:
                bias = self._model.get_submodule(self._paths[name]).bias
                stored = StoredLayer(name=name, size=self._sizes[name], bias=bias, read=read, metadata=metadata)
                layer = self._codec.restore(stored)
            except KeyError as missing:
                why = f"{self._folder} does not hold {missing.args[0]} of the quantized layer {name}"
                fix = "quantize the model again: job=quantize"
                raise ConfigError("model.weights", str(self._folder), why=why, fix=fix) from missing
            replace_layer(self._model, self._paths[name], layer)

    def check(self) -> None:
        """Raise if a layer was left out; call it after the last part."""
        check_all_quantized(self._model, list(self._paths.values()))


class _Placeholder(nn.Module):  # type: ignore[misc]
    """Holds the bias of a layer until its matrix is restored from files."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.bias = layer.bias
        self.weight = torch.empty(0)  # some families' initialisation reaches for those of certain names


def check_all_quantized(model: nn.Module, names: list[str]) -> None:
    """Raise where one of the layers named is not quantized."""
    left = [name for name in names if not is_quantized(model.get_submodule(name))]
    assert not left, f"layers left unquantized: {left}"


def _within(names: list[str], part: str) -> list[str]:
    return [name for name in names if name == part or name.startswith(f"{part}.")]


def metadata_of(files: list[Path]) -> dict[str, str]:
    """Return the metadata in the headers of safetensors files."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= opened.metadata() or {}
    return found
