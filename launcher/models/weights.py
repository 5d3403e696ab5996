"""Find the tensors of a Transformers model in a model folder or a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    SkipParameters,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.loading_report import LoadStateDictInfo

from launcher.checkpoint.foreign.source import open_foreign
from launcher.checkpoint.regions import Box, FlatRange, Region, Shape, slices
from launcher.checkpoint.tensors import StoredState
from launcher.config.model.folder import checkpoint_files, tensor_files, tensor_shapes, weight_files
from launcher.models.deferred_init import causal_lm_class
from launcher.protocol.foreign_files import find_foreign
from launcher.protocol.state_files import weight_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_SHOWN = 3
"""Names that an error lists."""
_ROWS = 4096
"""Rows of two tensors that are compared at a time."""


class TensorReader(Protocol):
    """Tensors under the names that files give them."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of each tensor by its name."""

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """Return a tensor, or a part of it."""


class ModelTensors(Protocol):
    """The tensors of a model, wherever they are stored."""

    shapes: dict[str, tuple[int, ...]]
    """Shape of everything that the files hold for this model, by its name in the model."""
    unexpected: set[str]
    """Further tensors of the files."""
    unconverted: dict[str, str]
    """Failed conversions by the name in the model, with the reason."""

    @property
    def missing(self) -> set[str]:
        """Names that the model needs and the files lack, one of several tied ones sufficing."""

    def mismatched(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return the names whose shapes differ, with that of the files and that of the model."""

    def read(self, names: Sequence[str]) -> Tensor | None:
        """Return the tensor that has one of ``names`` in the model; ``None`` if no file has it."""

    def are_equal(self, one: str, other: str) -> bool:
        """Return whether two names of the model have equal values, without loading either whole."""


def find_tensors(model: PreTrainedModel, folder: Path, *, skip: Callable[[str], bool]) -> ModelTensors:
    """Return the tensors of a model folder, or of a checkpoint of this or another program.

    Args:
        model: without storage; its names, shapes and conversion rules decide.
        folder: that holds them.
        skip: whether another reader reads a tensor of the files, by its name there.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged.
        JobError: a file of another program is damaged, or holds other objects than tensors.
    """
    if files := checkpoint_files(folder):
        return CheckpointTensors(model, files)
    if not weight_files(folder) and (foreign := find_foreign(folder)) is not None:
        return StoredTensors(model, open_foreign(foreign, with_moments=False).weights, skip=skip)
    return StoredTensors(model, SafetensorsFolder(folder), skip=skip)


def differences(stored: ModelTensors) -> str:
    """Return how the tensors of files differ from the model's; empty if they are the same."""
    mismatched = [f"{name} is {found} instead of {wanted}" for name, (found, wanted) in stored.mismatched().items()]
    mismatched += [f"{name} cannot be converted ({why})" for name, why in stored.unconverted.items()]
    parts = [
        f"{what} {listed(names)}"
        for what, names in (("lacks", stored.missing), ("also has", stored.unexpected), ("mismatched:", mismatched))
        if names
    ]
    return f"it {', and it '.join(parts)}" if parts else ""


def listed(names: Iterable[str]) -> str:
    """Return the first few of some names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more


class CheckpointTensors:
    """Finds tensors of a checkpoint of any strategy, which has them under the model's own names.

    Args:
        model: without storage; its names and shapes decide.
        files: that ranks wrote.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged.
    """

    def __init__(self, model: PreTrainedModel, files: Sequence[Path]) -> None:
        self._state = StoredState(files)
        self._wanted, self._ties = model.state_dict(), _same_parameters(model)
        names = weight_names(self._state.shapes)
        self.shapes = {name: self._state.shapes[name] for name in names & self._wanted.keys()}
        self.unexpected = names - self._wanted.keys()
        self.unconverted: dict[str, str] = {}

    @property
    def missing(self) -> set[str]:
        """Names that the model needs and the checkpoint lacks, one of several tied ones sufficing."""
        missing = set(self._wanted) - self.shapes.keys()
        for tied in self._ties:
            if tied & self.shapes.keys():
                missing -= tied
        return missing

    def mismatched(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return the names whose shapes differ, with that of the checkpoint and that of the model."""
        return _mismatched(self.shapes, self._wanted)

    def read(self, names: Sequence[str]) -> Tensor | None:
        """Return the tensor that has one of ``names`` in the model; ``None`` if there is none."""
        name = next((name for name in names if name in self.shapes), None)
        return None if name is None else self._state.read(name)

    def are_equal(self, one: str, other: str) -> bool:
        """Return whether two names of the model have equal values, without loading either whole."""
        shape = self.shapes[one]
        if shape != self.shapes[other]:
            return False
        for rows in _row_blocks(shape) if shape else [Box((), ())]:
            if not torch.equal(self._state.read(one, rows), self._state.read(other, rows)):
                return False
        return True


class BuiltTensors:
    """The tensors of a model that was built, for an export; none is copied.

    Args:
        model: with values.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._values: dict[str, Tensor] = model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._values.items()}
        self.unexpected: set[str] = set()
        self.unconverted: dict[str, str] = {}
        self.missing: set[str] = set()

    def mismatched(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return nothing: the tensors are the model's own."""
        return {}

    def read(self, names: Sequence[str]) -> Tensor | None:
        """Return the tensor that has one of ``names`` in the model; ``None`` if there is none."""
        name = next((name for name in names if name in self._values), None)
        return None if name is None else self._values[name]

    def are_equal(self, one: str, other: str) -> bool:
        """Return whether two names of the model have equal values."""
        first, second = self._values[one], self._values[other]
        return bool(first.data_ptr() == second.data_ptr() or torch.equal(first, second))


def _same_parameters(model: PreTrainedModel) -> list[set[str]]:
    """Return the names of each parameter of a model that has several."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return [tied for tied in names.values() if len(tied) > 1]


def _mismatched(
    shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Tensor]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    pairs = ((name, shape, tuple(wanted[name].shape)) for name, shape in shapes.items())
    return {name: (found, needed) for name, found, needed in pairs if found != needed}


@dataclass(kw_only=True)
class _TensorGroup:
    """Tensors of the files from which one conversion makes one or more tensors of the model."""

    rule: WeightRenaming | WeightConverter
    dtype: torch.dtype
    """Format to which each is cast before conversion, as in Transformers."""
    parts: list[tuple[str, str]] = field(default_factory=list)
    """Names in the files, each with the pattern of the rule that it matched."""


class StoredTensors:
    """Finds and converts tensors of files.

    Args:
        model: without storage; its names, shapes and conversion rules decide.
        reader: of the files.
        skip: whether another reader reads a tensor of the files, by its name there.
    """

    def __init__(
        self, model: PreTrainedModel, reader: TensorReader, *, skip: Callable[[str], bool] = lambda name: False
    ) -> None:
        self._model, self._reader = model, reader
        self._stored = {name: shape for name, shape in reader.shapes.items() if not skip(name)}
        self._wanted = model.state_dict()
        self._converted: dict[str, Tensor] = {}
        """Tensors from a conversion besides the requested one."""
        self._group_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of everything that the files hold for this model, by its name in the model."""
        self.unexpected: set[str] = set()
        """Further tensors of the files that Transformers does not know as leftovers."""
        self.unconverted: dict[str, str] = {}
        """Failed conversions by the name in the model, with the reason."""
        self._groups = self._grouped()
        for first, group in self._groups.items():
            self._try_out(first, group)

    @property
    def missing(self) -> set[str]:
        """Names that the model needs and the files lack, one of several tied ones sufficing."""
        missing = self._wanted.keys() - self.shapes.keys() - self.unconverted.keys()
        for tied in self._ties():
            if tied & self.shapes.keys():
                missing -= tied
        return set(self._known_to_transformers(missing_keys=missing).missing_keys)

    def mismatched(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return the names whose shapes differ, with that of the files and that of the model."""
        return _mismatched(self.shapes, self._wanted)

    def read(self, names: Sequence[str]) -> Tensor | None:
        """Return the tensor that has one of ``names`` in the model; ``None`` if no file has it."""
        name = next((name for name in names if name in self.shapes), None)
        if name is None:
            return None
        if name in self._converted:
            return self._converted.pop(name)
        group = self._groups[self._group_of[name]]
        made = _convert(
            group, self._group_of[name], self._model, lambda stored: self._reader.read(stored).to(group.dtype)
        )
        wanted = made.pop(name)
        self._converted |= made
        return wanted

    def are_equal(self, one: str, other: str) -> bool:
        """Return whether two names of the model have equal values, without loading either whole."""
        if self.shapes[one] != self.shapes[other]:
            return False
        groups = [self._groups[self._group_of[name]] for name in (one, other)]
        if any(isinstance(group.rule, WeightConverter) for group in groups) or not self.shapes[one]:
            return bool(torch.equal(*(self.read([name]) for name in (one, other))))
        dtype, names = groups[0].dtype, [group.parts[0][0] for group in groups]
        for rows in _row_blocks(self.shapes[one]):
            first, second = (self._reader.read(name, rows).to(dtype) for name in names)
            if not torch.equal(first, second):
                return False
        return True

    def name_in_files(self, name: str) -> str | None:
        """Return the files' name of a tensor of the model; ``None`` if a conversion makes it."""
        group = self._groups[self._group_of[name]]
        return None if isinstance(group.rule, WeightConverter) else group.parts[0][0]

    def _grouped(self) -> dict[str, _TensorGroup]:
        """Return the conversions of the files' tensors, by the first model name that each makes."""
        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix, wanted = self._model.base_model_prefix, self._wanted
        groups: dict[str, _TensorGroup] = {}
        for name in sorted(self._stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
            if target not in wanted and name in wanted:  # a file of ours, or of a version that did not rearrange it
                target, pattern = rename_source_key(name, [], [], prefix, wanted)
            if target not in wanted:
                self.unexpected.add(name)
                continue
            rule = WeightRenaming(name, target) if pattern is None else by_pattern[pattern]
            group = groups.setdefault(target, _TensorGroup(rule=rule, dtype=wanted[target].dtype))
            group.parts.append((name, pattern or name))
        self.unexpected = self._known_to_transformers(unexpected_keys=self.unexpected).unexpected_keys
        return groups

    def _try_out(self, first: str, group: _TensorGroup) -> None:
        """Convert tensors without storage; record the resulting names and shapes, or the error."""
        info = _no_findings()

        def empty(name: str) -> Tensor:
            return torch.empty(self._stored[name], dtype=group.dtype, device="meta")

        try:
            made = _convert(group, first, self._model, empty, info)
        except SkipParameters:
            said = info.conversion_errors[first].strip().splitlines()
            self.unconverted[first] = next((line for line in reversed(said) if not line.startswith("Error")), said[-1])
            return
        self.shapes |= {name: tuple(tensor.shape) for name, tensor in made.items()}
        self._group_of |= dict.fromkeys(made, first)

    def _ties(self) -> list[set[str]]:
        by_source: dict[str, set[str]] = {}
        for target, source in self._model.all_tied_weights_keys.items():
            by_source.setdefault(source, {source}).add(target)
        return list(by_source.values())

    def _known_to_transformers(self, **found: set[str]) -> LoadStateDictInfo:
        """Return findings without what Transformers passes over in silence."""
        info = _no_findings()
        for name, keys in found.items():
            setattr(info, name, keys)
        self._model._adjust_missing_and_unexpected_keys(info)  # noqa: SLF001  (the rules are nowhere else)
        return info


def _row_blocks(shape: Shape) -> Iterator[Box]:
    """Yield boxes of some rows that together are a tensor of at least one dimension."""
    for start in range(0, shape[0], _ROWS):
        yield Box((start, *(0 for _ in shape[1:])), (min(_ROWS, shape[0] - start), *shape[1:]))


class SafetensorsFolder:
    """The tensors of a model folder; each read opens its file anew.

    Args:
        folder: config and safetensors.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._files, self._shapes = tensor_files(folder), tensor_shapes(folder)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of each tensor by its name."""
        return self._shapes

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """Return a tensor, or a box of it."""
        assert not isinstance(region, FlatRange), "nothing asks for a range of a model folder"
        with safe_open(self._files[name], framework="pt") as opened:
            found: Tensor = opened.get_slice(name)[... if region is None else slices(region)]
            return found


def untie_differing_weights(model: PreTrainedModel, stored: ModelTensors) -> list[str]:
    """Untie tied parameters whose values differ in the files, as ``from_pretrained`` does.

    Returns:
        The names that are not tied any more.
    """
    untied = []
    for target, source in list(model.all_tied_weights_keys.items()):
        if {target, source} <= stored.shapes.keys() and not stored.are_equal(target, source):
            parent, _, key = target.rpartition(".")
            old = model.get_parameter(target)
            setattr(model.get_submodule(parent), key, torch.nn.Parameter(torch.empty_like(old)))
            del model.all_tied_weights_keys[target]
            untied.append(target)
    if untied and not model.all_tied_weights_keys:
        model.config.tie_word_embeddings = False  # whatever saves or rebuilds it must not tie them again
    return untied


def _convert(
    group: _TensorGroup,
    first: str,
    model: PreTrainedModel,
    read: Callable[[str], Tensor],
    info: LoadStateDictInfo | None = None,
) -> dict[str, Tensor]:
    rule = copy.deepcopy(group.rule)
    for name, pattern in group.parts:
        rule.add_tensor(first, name, pattern, lambda name=name: read(name))
    made = rule.convert(first, model=model, config=model.config, loading_info=info)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _no_findings() -> LoadStateDictInfo:
    return LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def save_model_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write ``config.json`` of a model whose weights are in fp32.

    The folder is made if it is missing.

    Transformers' own ``save_pretrained`` of a model imports DeepSpeed where that is installed, which takes seconds: too
    many for a run that is asked to save and leave.
    """
    own = copy.deepcopy(config)
    own.architectures, own.dtype = [causal_lm_class(config).__name__], torch.float32
    folder.mkdir(parents=True, exist_ok=True)
    own.save_pretrained(folder)
