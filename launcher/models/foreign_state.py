"""Name the tensors of another program's checkpoint as the model does, moments included."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from launcher.checkpoint.foreign.tensors import MOMENTS, ForeignTensors
from launcher.checkpoint.foreign.torch_pickle import BadCheckpoint
from launcher.checkpoint.regions import whole
from launcher.checkpoint.tensors import StoredState
from launcher.models.weights import StoredTensors, differences, listed

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


_UNDECAYED_BY_TRAINER = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Transformers' ``Trainer.get_decay_parameter_names``."""


@dataclass(frozen=True, kw_only=True)
class ForeignState:
    """What a run continues from."""

    tensors: StoredState
    """Weights, buffers, moments and steps by the model's names; missing moments are zero."""
    has_moments: bool
    """Whether any moments are those of the checkpoint."""
    without_moments: tuple[str, ...]
    """Parameters whose moments are zero although others have some."""


def state_of_model(model: PreTrainedModel, found: ForeignTensors, folder: Path) -> ForeignState:
    """Return the tensors of a checkpoint under the names of ``model``.

    Args:
        model: without storage.
        found: tensors under the names of the program that wrote them.
        folder: for messages.

    Raises:
        BadCheckpoint: they are not of this model, or it cannot be known which moments belong to which parameter.
    """
    stored = StoredTensors(model, found.weights)
    if wrong := differences(stored):
        raise BadCheckpoint(f"{folder} does not hold this model: {wrong}")
    for target, source in model.all_tied_weights_keys.items():
        if {target, source} <= stored.shapes.keys() and not stored.are_equal(target, source):
            why = f"{folder} holds {target} and {source} apart, and this model ties them"
            raise BadCheckpoint(f"{why}; set model.weights={folder} checkpoint.resume=none, which unties them")
    tensors = StoredState()
    parameters = list(_names_of_parameters(model))
    buffers = [[name] for name in model.state_dict() if not any(name in names for names in parameters)]
    for names in (*parameters, *buffers):
        name = next(name for name in names if name in stored.shapes)
        if (original := stored.name_in_files(name)) is not None:
            tensors.add_from(found.weights, original, renamed=names[0])
        else:
            shape = stored.shapes[name]
            values = _Converted(stored, name)
            tensors.add(names[0], shape, whole(shape), values, dtype=torch.float32, file=folder)
    moments = _by_number(model, found, folder) if found.order is not None else found.moments
    missing = []
    for names in parameters:
        known = [(stored.name_in_files(name) if name in stored.shapes else None) or name for name in names]
        if not _add_moments(tensors, moments, names[0], (*known, *names), folder):
            missing.append(names[0])
    has_moments = len(missing) < len(parameters)
    return ForeignState(tensors=tensors, has_moments=has_moments, without_moments=tuple(missing) if has_moments else ())


@dataclass(frozen=True)
class _Converted:
    """A tensor that Transformers makes of others."""

    stored: StoredTensors
    name: str

    def __getitem__(self, index: Any) -> Any:
        made = self.stored.read([self.name])
        assert made is not None, self.name
        return made[index]


def _names_of_parameters(model: nn.Module) -> Iterator[list[str]]:
    """Yield the names of each parameter, of tied ones all, the first one first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    yield from names.values()


def _add_moments(tensors: StoredState, moments: StoredState, name: str, known: Iterable[str], folder: Path) -> bool:
    """Add moments and step of a parameter; zeros, and False, if the checkpoint has none.

    Raises:
        BadCheckpoint: they are of another shape.
    """
    shape = tensors.shapes[name]
    original = next((each for each in known if f"exp_avg.{each}" in moments.shapes), None)
    if original is None:
        zero = torch.zeros(())
        for kind in MOMENTS:
            values = zero.expand(shape)
            tensors.add(f"{kind}.{name}", shape, whole(shape), values, dtype=zero.dtype, file=folder)
        tensors.add(f"step.{name}", (), whole(()), zero, dtype=zero.dtype, file=folder)
        return False
    for kind in (*MOMENTS, "step"):
        of_files = moments.shapes.get(f"{kind}.{original}")
        if of_files != (shape if kind != "step" else ()):
            raise BadCheckpoint(f"{folder}: {kind} of {name} is {of_files or 'missing'} instead of {shape}")
        tensors.add_from(moments, f"{kind}.{original}", renamed=f"{kind}.{name}")
    return True


def _by_number(model: PreTrainedModel, found: ForeignTensors, folder: Path) -> StoredState:
    """Return moments under parameters' names, where the checkpoint numbers them.

    The order is that of the model's parameters in each group of the optimizer. Which group a parameter is in follows
    from the known ways to divide them, tried by the shapes of the moments.

    Raises:
        BadCheckpoint: no known order fits, or several do.
    """
    groups = found.order or []
    shapes = {number: found.moments.shapes.get(f"exp_avg.{number}") for number in itertools.chain.from_iterable(groups)}
    fitting = [
        names
        for names in _known_orders(model, len(groups))
        if [len(each) for each in names] == [len(each) for each in groups]
        and all(
            shapes[number] in (None, tuple(model.get_parameter(name).shape))
            for name, number in zip(itertools.chain(*names), itertools.chain(*groups), strict=True)
        )
    ]
    if not fitting or any(names != fitting[0] for names in fitting):
        sizes = " + ".join(str(len(each)) for each in groups)
        why = "fits none of the known orders" if not fitting else "fits several orders"
        fix = f"set model.weights={folder} checkpoint.resume=none to start over from its weights"
        raise BadCheckpoint(f"{folder}: its optimizer numbers {sizes} parameters, which {why}; {fix}")
    renamed = StoredState()
    for name, number in zip(itertools.chain(*fitting[0]), itertools.chain(*groups), strict=True):
        for kind in (*MOMENTS, "step"):
            if f"{kind}.{number}" in found.moments.shapes:
                renamed.add_from(found.moments, f"{kind}.{number}", renamed=f"{kind}.{name}")
    return renamed


def _known_orders(model: PreTrainedModel, num_groups: int) -> Iterator[list[list[str]]]:
    """Yield the ways in which programs order a model's parameters in their optimizers.

    One group of all; Trainer's two, of which norms and biases are the second; and matrices before vectors.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if num_groups == 1:
        yield [list(trained)]
        return
    if num_groups != 2:
        return
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    yield _split(
        trained,
        [
            name
            for name in trained
            if name.rpartition(".")[0] not in norms and not _UNDECAYED_BY_TRAINER.search(name.lower())
        ],
    )
    yield _split(trained, [name for name, parameter in trained.items() if parameter.dim() >= 2])


def _split(trained: Mapping[str, Tensor], first: Sequence[str]) -> list[list[str]]:
    chosen = set(first)
    return [list(first), [name for name in trained if name not in chosen]]


def describe_start(state: ForeignState) -> str:
    """Return what a run takes over, for its log."""
    if not state.has_moments:
        return "weights; the optimizer's moments start at zero"
    if state.without_moments:
        return f"weights and moments, but for those of {listed(state.without_moments)}"
    return "weights and moments"
