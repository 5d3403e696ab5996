"""From a method to what does it on a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from torch import nn

from launcher.quantization.ao import AoCodec
from launcher.quantization.int4 import Int4Codec, Int4Linear
from launcher.quantization.methods import Int4Weight, Nf4
from launcher.quantization.nf4 import Nf4Codec

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.quantization.base import Quantization


class Codec(Protocol):
    """Makes quantised layers, takes them apart for files and puts them together again."""

    def check(self, name: str, in_features: int, *, option: str) -> None:
        """Refuse a layer whose size does not fit, by a ConfigError; ``option`` is how the method was chosen."""

    def quantise(self, layer: nn.Linear) -> nn.Module:
        """Return the layer that takes the place of one in floats."""

    def tensors(self, name: str, layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what files keep of a layer, its bias left out, and what their headers say."""

    def owns(self, name: str, stored: str) -> bool:
        """Return whether files keep a part of the layer ``name`` under ``stored``."""

    def restore(
        self,
        name: str,
        size: tuple[int, int],
        bias: nn.Parameter | None,
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str],
    ) -> nn.Module:
        """Return the layer of ``size`` (outputs, inputs) that files keep; a KeyError names what they lack."""


def codec_of(method: Quantization) -> Codec:
    """Return what does a method."""
    if isinstance(method, Int4Weight):
        return Int4Codec(method)
    return Nf4Codec() if isinstance(method, Nf4) else AoCodec(method)


def is_quantised(layer: nn.Module) -> bool:
    """Return whether a layer is one that a codec has made."""
    origin = type(getattr(layer, "weight", None)).__module__.partition(".")[0]
    return isinstance(layer, Int4Linear) or origin in ("torchao", "bitsandbytes")


def quantised(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that are quantised, by name."""
    for name, layer in model.named_modules():
        if is_quantised(layer):
            yield name, layer


def rounds_activations(layer: nn.Module) -> bool:
    """Return whether a layer rounds what comes in to few bits, too."""
    return getattr(getattr(layer, "weight", None), "act_quant_kwargs", None) is not None
