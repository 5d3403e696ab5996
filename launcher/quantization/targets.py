"""Which layers of a model are quantised: the matrices in its blocks, whatever class they are written as."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers.pytorch_utils import Conv1D

from launcher.errors import ConfigError
from launcher.suggest import did_you_mean


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers in the repeated blocks of a model, by name. Before any of them is quantised."""
    inside = tuple(f"{name}." for name, child in model.named_modules() if isinstance(child, nn.ModuleList))
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and name.startswith(inside)
    }


def targets(model: nn.Module, skip: Sequence[str], *, option: str) -> dict[str, nn.Module]:
    """Return the layers to quantise, by name: all matrices that no pattern of ``skip`` matches.

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
        raise ConfigError("quantization.skip", list(skip), why=why, fix="skip fewer, or set quantization=none")
    return left


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Return outputs and inputs of a linear layer; ``Conv1D`` keeps its matrix the other way round."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


def as_linear(layer: nn.Module) -> nn.Linear:
    """Return a layer as ``nn.Linear``: itself, or one with the matrix of a ``Conv1D`` turned round."""
    if not isinstance(layer, Conv1D):
        assert isinstance(layer, nn.Linear), "one of `matrices`"
        return layer
    made = nn.Linear(layer.nx, layer.nf, bias=True, device="meta")
    made.weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)
    made.bias = layer.bias
    return made.train(layer.training)


def place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return whose child a layer is, and under which name."""
    parent, _, key = name.rpartition(".")
    return model.get_submodule(parent), key


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another layer in the place of the one with this name."""
    parent, key = place(model, name)
    setattr(parent, key, layer)
