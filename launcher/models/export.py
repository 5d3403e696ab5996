"""Write a checkpoint of any strategy as a folder that Transformers alone can load."""

from __future__ import annotations

import copy
import errno
import itertools
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from launcher.checkpoint.tensors import DTYPE_NAMES
from launcher.config.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterUse,
    peft_key,
    read_adapter_folder,
)
from launcher.config.model.folder import INDEX_FILE, SINGLE_FILE
from launcher.errors import EXIT_BAD_INPUT, JobError
from launcher.models.adapters import AdapterTensors
from launcher.models.deferred_init import meta_model
from launcher.models.tokenizer import copy_tokenizer
from launcher.models.weights import differences, find_tensors, untie_differing_weights
from launcher.utils.files import fsync_folder, write_json
from launcher.utils.safetensors_header import TensorEntry, header_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from launcher.models.weights import ModelTensors

_GENERATION_FILE = "generation_config.json"


class ModelExport:
    """What Transformers needs of a checkpoint: weights, configs, tokenizer and chat template.

    Args:
        source: ``model/`` of a checkpoint, or a folder with a tokenizer; ``None`` if there is neither.
        dtype: of the weights, but for those that the family keeps in fp32.
        max_shard_bytes: of one file; a larger tensor has a file of its own.
        stored: the tensors, if they are others than the checkpoint's.
        config: of the model, if it is not the checkpoint's.

    Raises:
        JobError: the checkpoint does not hold the model that its config describes.
    """

    def __init__(
        self,
        source: Path | None,
        *,
        dtype: torch.dtype,
        max_shard_bytes: int,
        stored: ModelTensors | None = None,
        config: PreTrainedConfig | None = None,
    ) -> None:
        if config is None:
            assert source is not None, "the configuration is in it"
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if stored is not None and hasattr(config, "quantization_config"):
            del config.quantization_config  # of the files, and ``stored`` are other tensors
        model = meta_model(config, attention="eager", dtype=dtype)
        if stored is None:
            assert source is not None, "the tensors are in it"
            stored = find_tensors(model, source, skip=lambda name: False)
        if wrong := differences(stored):
            why = f"{source} does not hold the model that its config.json describes: {wrong}"
            raise JobError(why, exit_code=EXIT_BAD_INPUT)
        untie_differing_weights(model, stored)
        model.config.architectures, model.config.dtype = [type(model).__name__], dtype
        self._source, self._model, self._stored = source, model, stored
        self._conversion = _ReverseConversion(model, stored)
        self._shards = _split([group.entries for group in self._conversion.groups], max_shard_bytes)
        self.entries = list(itertools.chain(*self._shards))
        """Names, formats and shapes of the tensors, in order."""
        self.num_files = len(self._shards)
        self.num_bytes = sum(entry.num_bytes for entry in self.entries)
        self.num_params = sum(entry.numel for entry in self.entries)

    @property
    def source(self) -> Path:
        """The model folder that is exported."""
        assert self._source is not None, "an export of a folder"
        return self._source

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the model."""
        return self._model.config

    def values(self) -> Iterator[Tensor]:
        """Yield the tensors of ``entries`` in order, one conversion of Transformers at a time."""
        return self._conversion.values()

    def build(self) -> PreTrainedModel:
        """Return the whole model in fp32, with its weights, to compare a file with."""
        model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config), dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.state_dict(keep_vars=True).items():
                if (values := self._stored.read([name])) is not None:  # None: another of a tied parameter's names
                    parameter.copy_(values)
        return model

    def write(self, target: Path, *, written: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Write a folder, which appears once it is complete and on the disk.

        One tensor is in memory at a time, or all that one conversion of Transformers takes.

        Args:
            target: does not exist.
            written: called with the bytes of weights written since its last call.

        Raises:
            OSError: the disk is full, or ``target`` exists.
        """
        write_folder(target, lambda making: self.fill(making, written=written))

    def fill(self, folder: Path, *, written: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Write all files into an empty folder; arguments and errors are those of :meth:`write`."""
        _write_weights(folder, self._shards, self.values(), written=written)
        self._model.config.save_pretrained(folder)
        if self._source is not None:
            copy_tokenizer(self._source, folder)
        if not (folder / _GENERATION_FILE).exists() and self._model.can_generate():
            self._model.generation_config.save_pretrained(folder)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder, which appears once it is complete and on the disk.

    Args:
        target: does not exist.
        fill: writes the files into an empty folder.

    Raises:
        OSError: the disk is full, or ``target`` exists.
    """
    making = _incomplete(target)
    making.mkdir()
    try:
        fill(making)
        _sync(making)
        _rename_new(making, target)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    fsync_folder(target.parent)


def write_file(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a file, which appears once it is complete and on the disk.

    Args:
        target: does not exist.
        fill: writes the file of the name that it is given, which ends like ``target``.

    Raises:
        OSError: the disk is full, or ``target`` exists.
    """
    making = _incomplete(target)
    making = making.with_name(making.name + target.suffix)
    try:
        fill(making)
        with making.open("rb") as opened:
            os.fsync(opened.fileno())
        _rename_new(making, target)
    except BaseException:
        making.unlink(missing_ok=True)
        raise
    fsync_folder(target.parent)


def _incomplete(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.incomplete")


def _rename_new(making: Path, target: Path) -> None:
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    making.rename(target)


class AdapterExport:
    """A PEFT folder of an adapter: its tensors, its config and the tokenizer.

    Args:
        source: ``model/`` of a checkpoint that holds an adapter.
        dtype: of the tensors.
    """

    def __init__(self, source: Path, *, dtype: torch.dtype) -> None:
        self._source, found = source, read_adapter_folder("run", str(source), use=AdapterUse.MODEL)
        self._tensors = AdapterTensors(found)
        size = torch.empty((), dtype=dtype).element_size()
        self.num_params = sum(math.prod(shape) for shape in found.shapes.values())
        self.num_bytes, self._dtype = size * self.num_params, dtype

    def write(self, target: Path) -> None:
        """Write a folder, which appears once it is complete and on the disk.

        Raises:
            OSError: the disk is full, or ``target`` exists.
        """
        write_folder(target, self._fill)

    def _fill(self, folder: Path) -> None:
        tensors = {}
        for name in sorted(self._tensors.names):
            values = self._tensors.read(name)
            assert values is not None, "a name that the adapter has"
            tensors[peft_key(name)] = values.to(self._dtype).contiguous()
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        shutil.copyfile(self._source / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
        copy_tokenizer(self._source, folder)


@dataclass(frozen=True, kw_only=True)
class _TensorGroup:
    """Tensors of the model from which one conversion makes one or more tensors of the files."""

    names: tuple[str, ...]
    entries: tuple[TensorEntry, ...]


class _ReverseConversion:
    """Gives tensors of a model the names and shapes that files of its family have.

    Args:
        model: without storage, in the formats to write.
        stored: its tensors.
    """

    def __init__(self, model: PreTrainedModel, stored: ModelTensors) -> None:
        self._model, self._stored, self._wanted = model, stored, model.state_dict()
        rules = get_model_conversion_mapping(model, add_legacy=False)
        self._rules = [rule for rule in rules if not isinstance(rule, PrefixChange)]  # as save_pretrained does
        model._weight_conversions = self._rules  # noqa: SLF001  (or each conversion would look for them again)
        self._names = {_saved_name(model, name): name for name in self._kept_names()}
        self.groups = [self._planned(names) for names in self._grouped()]

    def _kept_names(self) -> list[str]:
        ignored = set(self._model._keys_to_ignore_on_save or ())  # noqa: SLF001
        return [name for name in self._stored.shapes if name not in ignored]

    def _grouped(self) -> Iterable[Sequence[str]]:
        """Return the names that are converted together."""
        names = sorted(self._names, key=dot_natural_key)
        reverse = [rule.reverse_transform() for rule in reversed(self._rules)]
        renamings = [rule for rule in reverse if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in reverse if isinstance(rule, WeightConverter)]
        groups: dict[tuple[str, bool], list[str]] = {}
        for name in names:
            renamed, pattern = rename_source_key(name, renamings, converters, reverse=True)
            groups.setdefault((renamed, pattern is not None), []).append(name)
        return groups.values()

    def _planned(self, names: Sequence[str]) -> _TensorGroup:
        """Convert tensors without storage."""
        shapes = self._stored.shapes
        empty = {name: torch.empty(shapes[self._names[name]], dtype=self._dtype(name), device="meta") for name in names}
        made = self._converted(empty)
        entries = (
            TensorEntry(name=name, dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape))
            for name, tensor in made.items()
        )
        return _TensorGroup(names=tuple(names), entries=tuple(entries))

    def _dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = self._wanted[self._names[name]].dtype
        return found

    def _converted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self._rules:
            return dict(tensors)
        made: dict[str, Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return made

    def values(self) -> Iterator[Tensor]:
        """Yield the tensors of all groups in order, reading one group at a time."""
        for group in self.groups:
            read = {}
            for name in group.names:
                tensor = self._stored.read([self._names[name]])
                assert tensor is not None, "a name that the checkpoint has"
                read[name] = tensor.to(self._dtype(name))
            made = self._converted(read)
            del read
            for entry in group.entries:
                yield made.pop(entry.name)


def _saved_name(model: PreTrainedModel, name: str) -> str:
    """Return the one of a tied parameter's names that Transformers loads the others from."""
    source: str = model.all_tied_weights_keys.get(name, name)
    return source


def _split(groups: Sequence[Sequence[TensorEntry]], max_bytes: int) -> list[list[TensorEntry]]:
    """Return the tensors of each file, in order."""
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in itertools.chain(*groups):
        if shards[-1] and size + entry.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def _write_weights(
    folder: Path, shards: Sequence[Sequence[TensorEntry]], values: Iterator[Tensor], *, written: Callable[[int], None]
) -> None:
    count = len(shards)
    stem, _, suffix = SINGLE_FILE.partition(".")
    names = [SINGLE_FILE] if count == 1 else [f"{stem}-{n:05d}-of-{count:05d}.{suffix}" for n in range(1, count + 1)]
    for name, entries in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(header_bytes(entries, {"format": "pt"}))
            for entry, tensor in zip(entries, values, strict=False):
                _write_values(file, tensor)
                written(entry.num_bytes)
    if count > 1:
        everything = [entry for entries in shards for entry in entries]
        about = {
            "total_size": sum(entry.num_bytes for entry in everything),
            "total_parameters": sum(entry.numel for entry in everything),
        }
        where = {entry.name: name for name, entries in zip(names, shards, strict=True) for entry in entries}
        write_json(folder / INDEX_FILE, {"metadata": about, "weight_map": where})


def _write_values(file: BinaryIO, tensor: Tensor) -> None:
    if tensor.numel():
        file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))  # no copy


def _sync(folder: Path) -> None:
    """Put all files below a folder on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    for below in (folder, *(entry for entry in folder.rglob("*") if entry.is_dir())):
        fsync_folder(below)
