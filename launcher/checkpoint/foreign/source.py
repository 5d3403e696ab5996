"""Open a checkpoint of another program, whichever wrote it."""

from __future__ import annotations

from typing import Any

from safetensors import safe_open

from launcher.checkpoint.foreign.dcp import read_dcp, read_dcp_safetensors
from launcher.checkpoint.foreign.deepspeed import read_deepspeed
from launcher.checkpoint.foreign.tensors import ForeignTensors, add_by_order, add_whole, clean_name
from launcher.checkpoint.foreign.torch_pickle import explain_damage, inside, load_torch_file
from launcher.checkpoint.regions import whole
from launcher.checkpoint.tensors import safetensors_dtype
from launcher.protocol.foreign_files import ForeignCheckpoint, ForeignFiles


def open_foreign(checkpoint: ForeignCheckpoint, *, with_moments: bool = True) -> ForeignTensors:
    """Return the tensors of a checkpoint, to be read one at a time.

    Args:
        checkpoint: by the names of its files.
        with_moments: whether the optimizer's state is needed.

    Raises:
        BadCheckpoint: a file is damaged, or holds other objects than tensors and plain values.
    """
    weights, optimizer = checkpoint.weights, checkpoint.optimizer
    if weights.format == "deepspeed":
        found = read_deepspeed(weights, optimizer)
    elif weights.format == "dcp":
        found = read_dcp(weights, optimizer if with_moments else None)
    elif weights.format == "dcp_safetensors":
        found = read_dcp_safetensors(weights)
    else:
        found = _read_whole(weights)
        if optimizer is not None and with_moments:
            _read_optimizer(found, optimizer)
    if checkpoint.step is not None:
        found.step = checkpoint.step
    return found


def _read_whole(files: ForeignFiles) -> ForeignTensors:
    found = ForeignTensors()
    for file in files.files:
        inside(files.folder, file)
        if files.format == "pickle":
            tree = load_torch_file(file)
            with explain_damage(file):
                for name, value in tree.items():
                    add_whole(found.weights, clean_name(name), value, file)
            continue
        with explain_damage(file):
            opened: Any = safe_open(str(file), framework="pt")
            for name in opened.keys():  # noqa: SIM118
                values = opened.get_slice(name)
                shape, dtype = tuple(values.get_shape()), safetensors_dtype(values.get_dtype())
                found.weights.add(clean_name(name), shape, whole(shape), values, dtype=dtype, file=file)
    return found


def _read_optimizer(found: ForeignTensors, files: ForeignFiles) -> None:
    for file in files.files:
        tree = load_torch_file(inside(files.folder, file))
        with explain_damage(file):
            add_by_order(found, tree, file)
