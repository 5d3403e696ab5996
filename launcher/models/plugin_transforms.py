"""Change a model by transforms of plugins, before it has storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from launcher.errors import ConfigError
from launcher.plugins.base import TRANSFORM
from launcher.plugins.calls import named_in_errors
from launcher.plugins.loading import executor

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def apply_transforms(model: PreTrainedModel, names: Sequence[str]) -> list[nn.Module]:
    """Apply transforms in their order; return the modules that they added.

    Args:
        model: on the meta device; modules that a transform creates are on it, too.
        names: of ``job.transforms``.

    Raises:
        JobError: a transform added a module whose parameters nothing can initialize, or returned something.
        PluginError: a transform raised an exception.
    """
    before = list(model.modules())  # kept: an id of one that is dropped could be used again
    known = set(map(id, before))
    added: list[nn.Module] = []
    for name in names:
        transform = executor(TRANSFORM, name, {})
        with named_in_errors(TRANSFORM, name):
            with torch.device("meta"):
                answer = transform(model)
            if answer is not None:
                why = f"returned {type(answer).__name__}: only changes to the model itself count"
                raise _error(name, why, "change the model in place, and return nothing")
            new = [module for module in model.modules() if id(module) not in known]
            for module in new:
                _check_added(name, module)
        added += new
        known |= set(map(id, new))
    return added


def own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the parameters and buffers of a module itself, without its children's."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _check_added(name: str, module: nn.Module) -> None:
    tensors, kind = list(own_tensors(module)), type(module).__name__
    if not all(tensor.is_meta for tensor in tensors):
        why = f"{kind} has values already, and those of a model are drawn or loaded part by part"
        raise _error(name, why, "create it without a device, and set values in its reset_parameters()")
    if tensors and not callable(getattr(module, "reset_parameters", None)):
        why = f"{kind} has parameters or buffers and no reset_parameters(), so nothing would set their values"
        raise _error(name, why, "add this method to the class")


def _error(name: str, why: str, fix: str) -> ConfigError:
    return ConfigError("job.transforms", name, why=why, fix=fix)
