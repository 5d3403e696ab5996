"""Checkpoints of other programs: which program wrote a folder, and what its files hold.

Judged by the names of files, by ``latest`` and by ``trainer_state.json``. The parent does so without torch; ranks then
read the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher.utils.files import read_named

LOOKED_FOR = (
    "latest or *_model_states.pt of DeepSpeed, .metadata of torch.distributed.checkpoint, model.safetensors or "
    "pytorch_model.bin of accelerate and Trainer, whole or with an index"
)
"""For messages about a folder that is none of these."""

Format = Literal["deepspeed", "dcp", "dcp_safetensors", "safetensors", "pickle"]

_ZERO_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_ZERO_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_DCP_SAFETENSORS = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_NUMBERED = re.compile(r"(?:checkpoint-|global_step|step-)(\d+)")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MAX_LATEST_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class ForeignFiles:
    """The files of one part of a checkpoint: the weights, or the optimizer."""

    format: Format
    folder: Path
    files: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class ForeignCheckpoint:
    """A checkpoint of another program."""

    folder: Path
    """As the user named it."""
    title: str
    """What it is, for people."""
    weights: ForeignFiles
    optimizer: ForeignFiles | None = None
    """``None`` where there is none, and where it is in the same files as the weights."""
    step: int | None = None
    """Optimizer steps done, where names of files tell."""

    def weight_files(self) -> list[Path]:
        """Return every file that may hold a part of the weights."""
        parts = [self.weights, *([self.optimizer] if self.optimizer and self.weights.format == "deepspeed" else [])]
        files = {file for part in parts for file in part.files}
        if self.weights.format == "dcp":
            files |= {file for file in self.weights.folder.iterdir() if file.is_file()}
        return sorted(files)

    @property
    def may_hold_moments(self) -> bool:
        """Whether files are there that hold the optimizer's state."""
        in_one_folder = self.weights.format == "dcp" and self.weights.folder == self.folder
        return self.optimizer is not None or self.weights.format == "deepspeed" or in_one_folder


def find_foreign(folder: Path) -> ForeignCheckpoint | None:
    """Return the checkpoint of another program in ``folder``; ``None`` if it is none.

    Raises:
        ValueError: it is one that cannot be read: files are missing, or it is cut in another way.
        OSError: the folder cannot be read.
    """
    if not folder.is_dir():
        return None
    names = {entry.name for entry in folder.iterdir()}
    found = _deepspeed(folder, names) or _dcp(folder, names) or _accelerate(folder, names)
    if found is None:
        return _newest_below(folder, names)
    return replace(found, folder=folder, step=_trainer_step(folder, names) or found.step)


def _newest_below(folder: Path, names: Iterable[str]) -> ForeignCheckpoint | None:
    """Return the checkpoint of the highest step below a folder (``checkpoint-500``)."""
    numbered = ((int(match[1]), name) for name in names if (match := _NUMBERED.fullmatch(name)))
    for step, name in sorted(numbered, reverse=True):
        if (found := find_foreign(folder / name)) is not None:
            return replace(found, step=step if found.step is None else found.step)
    return None


def _deepspeed(folder: Path, names: set[str]) -> ForeignCheckpoint | None:
    tag = _deepspeed_tag(folder, names)
    if tag is None:
        return None
    found = sorted(entry.name for entry in tag.iterdir())
    if any(name.startswith("layer_") for name in found):
        raise ValueError(f"{tag} is of DeepSpeed's pipeline or experts, one file a layer, which is not read")
    if any(match for name in found if (match := _MODEL.fullmatch(name)) and int(match[1])):
        raise ValueError(f"{tag} is cut by tensor parallelism (mp_rank_01_…), which is not read")
    optimizer = _by_rank(tag, found, _ZERO_OPTIMIZER)
    parts = _by_rank(tag, found, _ZERO_MODEL)
    model = parts or [tag / name for name in found if _MODEL.fullmatch(name)]
    if not model:
        raise ValueError(f"{tag} holds no mp_rank_00_model_states.pt")
    if parts and optimizer and len(parts) != len(optimizer):
        raise ValueError(f"{tag} has {len(parts)} files of the model's parts and {len(optimizer)} of the optimizer's")
    step = _NUMBERED.fullmatch(tag.name)
    files = ForeignFiles(format="deepspeed", folder=tag, files=tuple(model))
    return ForeignCheckpoint(
        folder=folder,
        title="DeepSpeed checkpoint" + (f" of ZeRO on {len(optimizer)} ranks" if optimizer else ""),
        weights=files,
        optimizer=ForeignFiles(format="deepspeed", folder=tag, files=tuple(optimizer)) if optimizer else None,
        step=int(step[1]) if step else None,
    )


def _deepspeed_tag(folder: Path, names: set[str]) -> Path | None:
    """Return the folder with DeepSpeed's files."""
    if any(_MODEL.fullmatch(name) or _ZERO_MODEL.fullmatch(name) for name in names):
        return folder
    if "latest" in names:
        tag = read_named(folder / "latest", limit=_MAX_LATEST_BYTES).decode(errors="replace").strip()
        if not tag or Path(tag).name != tag or not (folder / tag).is_dir():
            raise ValueError(f"its file latest names {tag!r}, which is not a folder in it")
        return folder / tag
    steps = [(int(name.removeprefix("global_step")), name) for name in names if re.fullmatch(r"global_step\d+", name)]
    return folder / max(steps)[1] if steps else None


def _by_rank(tag: Path, names: Iterable[str], pattern: re.Pattern[str]) -> list[Path]:
    """Return one file a rank in the order of ranks."""
    files: dict[int, Path] = {}
    for name in names:
        if (match := pattern.fullmatch(name)) is None:
            continue
        if int(match[2]):
            raise ValueError(f"{tag} is cut by tensor parallelism ({name}), which is not read")
        files[int(match[1])] = tag / name
    missing = [rank for rank in range(max(files, default=-1) + 1) if rank not in files]
    if missing:
        raise ValueError(f"{tag} lacks the file of rank {missing[0]}, beside {next(iter(files.values())).name}")
    return [files[rank] for rank in sorted(files)]


def _dcp(folder: Path, names: set[str]) -> ForeignCheckpoint | None:
    step = _NUMBERED.fullmatch(folder.name)
    number = int(step[1]) if step else None
    if ".metadata" in names:
        files = _dcp_files(folder)
        title = "torch.distributed.checkpoint folder"
        return ForeignCheckpoint(folder=folder, title=title, weights=files, step=number)
    if "pytorch_model_fsdp_0" in names:
        optimizer = _dcp_files(folder / "optimizer_0") if "optimizer_0" in names else None
        weights = _dcp_files(folder / "pytorch_model_fsdp_0")
        title = "FSDP checkpoint of " + ("Trainer" if "trainer_state.json" in names else "accelerate")
        return ForeignCheckpoint(folder=folder, title=title, weights=weights, optimizer=optimizer, step=number)
    at = folder if any(map(_DCP_SAFETENSORS.fullmatch, names)) else folder / "sharded"
    if at == folder or ("sharded" in names and not names & {"model.safetensors", *_INDEXES}):
        shards = tuple(sorted(entry for entry in at.iterdir() if _DCP_SAFETENSORS.fullmatch(entry.name)))
        title = "torch.distributed.checkpoint folder of safetensors"
        files = ForeignFiles(format="dcp_safetensors", folder=at, files=shards)
        return ForeignCheckpoint(folder=folder, title=title, weights=files, step=number) if shards else None
    return None


def _dcp_files(folder: Path) -> ForeignFiles:
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder} has no .metadata, so it was not finished")
    return ForeignFiles(format="dcp", folder=folder, files=(folder / ".metadata",))


def _accelerate(folder: Path, names: set[str]) -> ForeignCheckpoint | None:
    weights = _whole_weights(folder, names)
    if weights is None:
        return None
    by_trainer = "trainer_state.json" in names
    by_accelerate = any(re.fullmatch(r"random_states_\d+\.pkl|scheduler\.bin|optimizer\.bin", name) for name in names)
    name = next((name for name in ("optimizer.pt", "optimizer.bin") if name in names), None)
    optimizer = ForeignFiles(format="pickle", folder=folder, files=(folder / name,)) if name else None
    title = "Trainer checkpoint" if by_trainer else "accelerate checkpoint" if by_accelerate else "folder of weights"
    step = _NUMBERED.fullmatch(folder.name)
    return ForeignCheckpoint(
        folder=folder, title=title, weights=weights, optimizer=optimizer, step=int(step[1]) if step else None
    )


def _whole_weights(folder: Path, names: set[str]) -> ForeignFiles | None:
    """Return the files of whole weights, safetensors before pickles."""
    single: tuple[tuple[str, Format], ...] = (
        ("model.safetensors", "safetensors"),
        ("model.safetensors.index.json", "safetensors"),
        ("pytorch_model.bin", "pickle"),
        ("pytorch_model.bin.index.json", "pickle"),
        ("pytorch_model_fsdp.bin", "pickle"),
    )
    for name, kind in single:
        if name in names:
            files = _indexed(folder / name) if name.endswith(".json") else (folder / name,)
            return ForeignFiles(format=kind, folder=folder, files=files)
    return None


def _indexed(index: Path) -> tuple[Path, ...]:
    tree = _json(index)
    names = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index.name} has no weight_map from tensors to files")
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise ValueError(f"{index.name} names {name!r}, which is not a file of the folder")
        if not (index.parent / name).is_file():
            raise ValueError(f"{name} is missing, which {index.name} names")
    return tuple(index.parent / name for name in sorted(set(names.values())))


def _trainer_step(folder: Path, names: set[str]) -> int | None:
    """Return the steps that Transformers' Trainer has noted."""
    if "trainer_state.json" not in names:
        return None
    tree = _json(folder / "trainer_state.json")
    step = tree.get("global_step") if isinstance(tree, dict) else None
    if type(step) is not int or step < 0:
        raise ValueError("trainer_state.json has no global_step")
    return step


def _json(file: Path) -> Any:
    try:
        return json.loads(read_named(file).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from None
