"""Read DeepSpeed's checkpoints: whole, or divided among ranks by ZeRO-1, 2 or 3.

Weights are the fp32 masters. ZeRO-1 and 2 flatten all parameters of an optimizer's group into one vector and give each
rank an equal range of it. ZeRO-3 gives each rank an equal part of every parameter; a rank's parts lie one after the
other, in one vector or several. The same is true of moments. (DeepSpeed's own ``zero_to_fp32.py`` does it for weights.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher.checkpoint.foreign.tensors import (
    MOMENTS,
    ForeignTensors,
    add_by_order,
    add_flat,
    add_step,
    add_whole,
    clean_name,
)
from launcher.checkpoint.foreign.torch_pickle import explain_damage, inside, load_torch_file, stored_tensor
from launcher.checkpoint.tensors import StoredState
from launcher.protocol.foreign_files import ForeignFiles

Shapes = Mapping[str, tuple[int, ...]]


def read_deepspeed(model: ForeignFiles, optimizer: ForeignFiles | None) -> ForeignTensors:
    """Return the tensors of a DeepSpeed checkpoint.

    Args:
        model: files of the module, one or one a rank.
        optimizer: files of ZeRO's optimizer, one a rank; ``None`` without ZeRO.

    Raises:
        BadCheckpoint: a file is damaged, holds other objects, or the parts do not fit together.
    """
    trees = [load_torch_file(inside(model.folder, file)) for file in model.files]
    found = ForeignTensors()
    with explain_damage(model.files[0]):
        main = trees[0]
        found.step = int(main["global_steps"])
        groups = [_shapes(group) for group in main.get("param_shapes") or []]
        divided = {name for group in groups for name in group}
        frozen = _shapes(main.get("frozen_param_shapes") or {})
        if optimizer is None and len(trees) > 1:
            raise ValueError("the parts of its parameters (zero_pp_rank_…_optim_states.pt) are missing")
        shared = [(str(name), str(other)) for name, other in (main.get("shared_params") or {}).items()]
        elsewhere = divided | frozen.keys() if optimizer else set()
        tied = {name for pair in shared if elsewhere & set(pair) for name in pair}
        whole = set(main["module"]) - elsewhere - tied  # where tied names have the values of half precision
        for name in sorted(whole):
            value = main["module"][name]
            if value is not None and (value.numel() or len(trees) == 1):
                add_whole(found.weights, clean_name(name), value, model.files[0])
        _add_frozen(found.weights, frozen, [tree.get("frozen_param_fragments") or {} for tree in trees], model)
    if optimizer is not None:
        _add_zero(found, groups, optimizer)
    elif isinstance(main.get("optimizer"), Mapping):
        with explain_damage(model.files[0]):
            _add_undivided(found, main["optimizer"], model.files[0])
    for pair in shared:
        for name, other in (map(clean_name, pair), map(clean_name, reversed(pair))):
            if other in found.weights.shapes and name not in found.weights.shapes:
                found.weights.add_from(found.weights, other, renamed=name)
    return found


def _shapes(group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {str(name): tuple(map(int, shape)) for name, shape in group.items()}


def _add_frozen(
    state: StoredState, shapes: Shapes, fragments: Sequence[Mapping[str, Tensor]], files: ForeignFiles
) -> None:
    """Add parameters that are not trained: whole, or one part a rank."""
    for name, shape in shapes.items():
        parts = [each[name] for each in fragments if name in each]
        if parts and parts[0].numel() == math.prod(shape):
            parts = parts[:1]
        start = 0
        for file, part in zip(files.files, parts, strict=False):
            count = min(part.numel(), math.prod(shape) - start)
            if count > 0:
                add_flat(state, clean_name(name), shape, start, stored_tensor(part).reshape(-1)[:count], file)
            start += part.numel()


def _add_undivided(found: ForeignTensors, tree: Mapping[str, Any], file: Path) -> None:
    """Add the moments of an optimizer without ZeRO; those of its fp16 optimizer have no names."""
    if "state" in tree:
        add_by_order(found, tree, file)


def _add_zero(found: ForeignTensors, groups: Sequence[Shapes], optimizer: ForeignFiles) -> None:
    ranks = []
    for number, file in enumerate(optimizer.files):
        tree = load_torch_file(inside(optimizer.folder, file))
        with explain_damage(file):
            ranks.append(_RankState(tree["optimizer_state_dict"], file, num_ranks=len(optimizer.files), rank=number))
    with explain_damage(optimizer.files[0]):
        place = _in_whole_groups if ranks[0].is_divided_by_group else _in_every_parameter
        for kind, state, prefix in (
            ("master", found.weights, ""),
            *((name, found.moments, f"{name}.") for name in MOMENTS),
        ):
            vectors = [rank.vectors(kind) for rank in ranks]
            if kind != "master" and not any(vectors):
                continue  # saved without moments
            for rank, name, shape, start, values in place(groups, vectors):
                add_flat(state, prefix + clean_name(name), shape, start, values, optimizer.files[rank])
        for name in (name for group in groups for name in group):
            steps = ranks[0].step
            if steps is not None:
                add_step(found.moments, clean_name(name), steps, optimizer.files[0])


class _RankState:
    """ZeRO's state of one rank.

    Args:
        tree: content of its file.
        file: for messages.
        num_ranks: files that were found.
        rank: of them.

    Raises:
        ValueError: it is of another kind than those read here.
    """

    def __init__(self, tree: Mapping[str, Any], file: Path, *, num_ranks: int, rank: int) -> None:
        self._tree, self._file = tree, file
        self.is_divided_by_group = "single_partition_of_fp32_groups" in tree
        if not self.is_divided_by_group and "fp32_flat_groups" not in tree:
            raise ValueError("it holds no fp32 weights of ZeRO")
        if tree.get("ds_zero_partition_groups") is not None:
            raise ValueError("its parameters are divided among groups of experts, which is not read")
        counts = tree["partition_count"]
        counts = list(counts) if isinstance(counts, list | tuple) else [counts]
        if any(count != num_ranks for count in counts):
            raise ValueError(f"it is of {max(counts)} ranks, and there are files of {num_ranks}")
        self._states = self._optimizer_states()
        self._rank = rank

    def _optimizer_states(self) -> list[Mapping[str, Any]]:
        """Return AdamW's state of each of its vectors."""
        key = "base_optimizer_state" if self.is_divided_by_group else "optimizer_state_dict"
        kept = self._tree.get(key)
        if isinstance(kept, list):  # an elastic checkpoint
            step = self._tree.get("base_optimizer_state_step")
            return [{"step": step, **state} if step is not None else state for state in kept]
        states = kept.get("state") if isinstance(kept, Mapping) else None
        if not states:
            return []
        groups = kept["param_groups"] if isinstance(kept, Mapping) else []
        numbers = [number for group in groups for number in group["params"]]
        step = next((group["step"] for group in groups if "step" in group), None)  # of fused optimizers
        return [{**({"step": step} if step is not None else {}), **states[number]} for number in numbers]

    @property
    def step(self) -> Any:
        """The optimizer's count of its steps; ``None`` where it is not there."""
        return next((state["step"] for state in self._states if "step" in state), None)

    def vectors(self, kind: str) -> list[Tensor]:
        """Return the vectors of masters or of a moment; none where they are not there."""
        if kind == "master":
            key = "single_partition_of_fp32_groups" if self.is_divided_by_group else "fp32_flat_groups"
            return [stored_tensor(vector).reshape(-1) for vector in self._tree[key]]
        if self._states and not all(kind in state for state in self._states):
            kept = ", ".join(sorted(self._states[0])) or "nothing"
            raise ValueError(f"its optimizer is not AdamW: it keeps {kept}, without {kind}")
        return [stored_tensor(state[kind]).reshape(-1) for state in self._states]


Part = tuple[int, str, tuple[int, ...], int, Tensor]
"""A rank, a parameter, its shape, the first element of the part, and its values."""


def _in_whole_groups(groups: Sequence[Shapes], ranks: Sequence[Sequence[Tensor]]) -> Iterator[Part]:
    """Yield the parts of parameters in vectors of ZeRO-1 and 2."""
    if any(len(vectors) != len(groups) for vectors in ranks):
        raise ValueError(f"it has {len(ranks[0])} vectors for {len(groups)} groups of parameters")
    for number, group in enumerate(groups):
        length = ranks[0][number].numel()  # that of the last rank may lack padding
        first = 0
        for name, shape in group.items():
            stop = first + math.prod(shape)
            for rank, vectors in enumerate(ranks):
                start, end = max(first, rank * length), min(stop, rank * length + vectors[number].numel())
                if start < end or (first == stop and rank == 0):
                    part = vectors[number][start - rank * length : end - rank * length]
                    yield rank, name, shape, start - first, part
            first = stop
        if first > length * len(ranks):
            raise ValueError(f"its parameters have {first} elements, and its vectors {length * len(ranks)}")


def _in_every_parameter(groups: Sequence[Shapes], ranks: Sequence[Sequence[Tensor]]) -> Iterator[Part]:
    """Yield the parts of parameters in vectors of ZeRO-3."""
    for rank, vectors in enumerate(ranks):
        ends = [0]
        for vector in vectors:
            ends.append(ends[-1] + vector.numel())
        at = 0
        for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
            numel = math.prod(shape)
            share = -(-numel // len(ranks))
            start, stop = min(rank * share, numel), min((rank + 1) * share, numel)
            if at + share > ends[-1]:
                raise ValueError(f"rank {rank} has {ends[-1]} elements, too few for its part of {name}")
            for vector, begin, end in zip(vectors, ends, ends[1:], strict=False):
                low, high = max(at, begin), min(at + stop - start, end)
                if low < high:
                    yield rank, name, shape, start + low - at, vector[low - begin : high - begin]
            at += share
