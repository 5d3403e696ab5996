"""8-bit matrix products in the blocks of a model, by torchao."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from launcher.errors import ConfigError
from launcher.precision import FP8_MULTIPLE, Fp8

if TYPE_CHECKING:
    from launcher.precision import Precision


def apply_float8(module: nn.Module, precision: Precision) -> None:
    """Have the linear layers in the blocks of ``module`` multiply in 8 bits; weights and their names stay.

    The output head and the embedding stay as they are: their errors weigh most.

    Args:
        module: anything that holds blocks of Transformers, before anything wraps it.
        precision: does something where it is ``Fp8``.

    Raises:
        ConfigError: torchao is not installed; there are no linear layers; or the sizes of one do not fit the hardware.
    """
    if not isinstance(precision, Fp8):
        return
    for problem in precision.preflight():
        raise problem
    from torchao.float8 import convert_to_float8_training

    layers = [
        layer
        for block in module.modules()
        if isinstance(block, GradientCheckpointingLayer)
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    ]
    if not layers:
        why = f"the blocks of {type(module).__name__} hold no torch.nn.Linear, and torchao converts nothing else"
        raise ConfigError("precision", Fp8.kind, why=why, fix="set precision=bf16")
    for layer in layers:
        if layer.in_features % FP8_MULTIPLE or layer.out_features % FP8_MULTIPLE:
            why = f"a layer of {layer.in_features} × {layer.out_features} is not made of multiples of {FP8_MULTIPLE}"
            raise ConfigError("precision", Fp8.kind, why=why, fix="set precision=bf16")
    convert_to_float8_training(module, module_filter_fn=lambda layer, _: any(layer is one for one in layers))
