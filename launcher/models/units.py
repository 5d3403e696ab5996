"""A model as the list of its parts that are built, sharded and balanced one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def units(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of a causal language model by name: embeddings, each block, norms, the output head.

    Containers of blocks are opened, everything else is a part as it stands.
    """
    base = model.base_model
    for name, child in model.named_children():
        if child is base:
            yield from _parts(base, f"{name}.")
        else:
            yield name, child
    if base is model:
        yield from _parts(model, "")


def _parts(base: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList):
            for key, block in child.named_children():
                yield f"{prefix}{name}.{key}", block
        else:
            yield f"{prefix}{name}", child


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated blocks, in order: what is in the longest list of modules of the base model."""
    lists = [child for child in model.base_model.children() if isinstance(child, nn.ModuleList)]
    return max(map(list, lists), key=len, default=[])


def initialise(model: PreTrainedModel, name: str, unit: nn.Module, *, seed: int) -> None:
    """Draw the weights of one part, on the CPU, as the model's own class would.

    What is drawn depends on the seed and the name of the part alone, so a rank that builds only some of them gets the
    weights that a rank which builds all of them has there. torch's global generator is left as it was.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int.from_bytes(digest, "little"))
        _draw(unit, model)


def _draw(module: nn.Module, owner: PreTrainedModel) -> None:
    from transformers import PreTrainedModel

    for child in module.children():
        _draw(child, child if isinstance(child, PreTrainedModel) else owner)
    owner._init_weights(module)  # noqa: SLF001  (Transformers' own hook, which every model class overrides)
