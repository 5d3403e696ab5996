"""Which layers of a model are quantized, and how many bytes its weights take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from launcher.errors import ConfigError
from launcher.utils.text import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers in a model's blocks by name, before any is quantized."""
    inside = tuple(f"{name}." for name, child in model.named_modules() if isinstance(child, nn.ModuleList))
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and name.startswith(inside)
    }


def quantized_targets(model: nn.Module, skip: Sequence[str], *, option: str) -> dict[str, nn.Module]:
    """Return the layers to quantize, by name: all matrices that no pattern of ``skip`` matches.

    Raises:
        ConfigError: the model has none, a pattern matches none, or nothing is left.
    """
    found = matrices(model)
    if not found:
        why = f"the blocks of {type(model).__name__} hold no linear layers"
        raise ConfigError(option, None, why=why, fix="choose another model")
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in found):
            why = f"{pattern!r} matches no linear layer of {type(model).__name__}"
            raise ConfigError("quantization.skip", list(skip), why=why, fix=did_you_mean(pattern, list(found)))
    left = {name: layer for name, layer in found.items() if not any(fnmatchcase(name, each) for each in skip)}
    if not left:
        why = "the patterns match every layer"
        raise ConfigError("quantization.skip", list(skip), why=why, fix="skip fewer layers, or set quantization=none")
    return left


def matrix_size(layer: nn.Module) -> tuple[int, int]:
    """Return outputs and inputs of a linear layer; ``Conv1D`` stores its matrix transposed."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


def as_linear(layer: nn.Module) -> nn.Linear:
    """Return a layer as ``nn.Linear``: itself, or one with ``Conv1D``'s matrix transposed."""
    if not isinstance(layer, Conv1D):
        assert isinstance(layer, nn.Linear), "one of `matrices`"
        return layer
    made = nn.Linear(layer.nx, layer.nf, bias=True, device="meta")
    made.weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)
    made.bias = layer.bias
    return made.train(layer.training)


def parent_and_name(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the parent module of a layer, and its name there."""
    parent, _, key = name.rpartition(".")
    return model.get_submodule(parent), key


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the layer of this name by another."""
    parent, key = parent_and_name(model, name)
    setattr(parent, key, layer)


LAYERS, EMBEDDINGS, REST = "quantized layers", "embeddings and head", "everything else"
GROUPS = (LAYERS, EMBEDDINGS, REST)


def bytes_by_group(model: PreTrainedModel, layers: set[str]) -> dict[str, int]:
    """Return the bytes in memory of each group; tensors that are shared count once.

    Args:
        model: quantized or not.
        layers: names of those that are, or will be, quantized; their biases belong to the rest.
    """
    found, seen = dict.fromkeys(GROUPS, 0), set[int]()
    outer = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for name, module in model.named_modules():
        for key, tensor in own_tensors(module):
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            group = LAYERS if name in layers and key != "bias" else EMBEDDINGS if id(module) in outer else REST
            found[group] += tensor.nbytes
    return found


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors that a module holds, those inside quantized weights included."""
    for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield from ((key, part) for part in _plain_tensors(tensor))


def _plain_tensors(tensor: Any) -> Iterator[Tensor]:
    state = getattr(tensor, "quant_state", None)  # bitsandbytes
    names = [*getattr(tensor, "tensor_data_names", ()), *getattr(tensor, "optional_tensor_data_names", ())]
    if names:  # torchao
        yield from (part for name in names if (part := getattr(tensor, name)) is not None)
    elif state is not None:
        yield tensor.data
        yield from (part for part in (state.absmax, state.code) if part is not None)
    else:
        yield tensor.detach()


def bf16_bytes(model: PreTrainedModel, layers: set[str]) -> int:
    """Return the bytes of these layers' matrices in bf16; the model is not quantized."""
    found = matrices(model)
    return sum(2 * found[name].weight.numel() for name in layers)
