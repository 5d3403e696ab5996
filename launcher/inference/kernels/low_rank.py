"""Low-rank updates of linear layers (LoRA) for many adapters in one step, each row its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import Array, addressof
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from launcher.inference.kernels.native import (
    AdapterRowsStruct,
    LinearStruct,
    LowRankStruct,
    PackedMatrix,
    StepLayout,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LowRank:
    """One adapter's update of a layer: ``y += up @ down @ x``, in fp32."""

    down: Tensor
    """(rank, in)."""
    up: Tensor
    """(out, rank), scaled."""


class AdapterRows:
    """Tokens of a step by adapter; tokens of the base model, and padding, are in no group.

    Args:
        plan: of the step.
        device: of the model.

    Attributes:
        groups: number of an adapter, and its tokens.
    """

    def __init__(self, plan: StepLayout, *, device: torch.device) -> None:
        tokens: dict[int, list[int]] = {}
        at = 0
        for segment in plan.segments:
            count = len(segment.tokens)
            if segment.adapter:
                tokens.setdefault(segment.adapter - 1, []).extend(range(at, at + count))
            at += count
        self.groups = [(number, torch.tensor(own, device=device)) for number, own in tokens.items()]
        first = [0]
        for own in tokens.values():
            first.append(first[-1] + len(own))
        lists = (list(tokens), first, [token for own in tokens.values() for token in own])
        self._kept = [torch.tensor(numbers, dtype=torch.long) for numbers in lists]
        self.struct = AdapterRowsStruct(len(tokens), *(tensor.data_ptr() for tensor in self._kept))


class AdapterSet:
    """The adapters of an engine, and which token of the current step has which.

    Args:
        names: of the adapters; segments of a plan refer to them by number, from 1.
        layers: the updates of each layer that has some, by number of the adapter, from 0.
    """

    def __init__(self, names: Sequence[str], layers: Mapping[nn.Module, Mapping[int, LowRank]]) -> None:
        self.names = tuple(names)
        self._layers = layers
        self.rows: AdapterRows | None = None
        """Of the current step; ``None`` if it is the base model's alone."""

    def begin(self, plan: StepLayout, *, device: torch.device) -> None:
        """Take in which tokens of a step have which adapter."""
        is_adapted = any(segment.adapter for segment in plan.segments)
        self.rows = AdapterRows(plan, device=device) if is_adapted else None

    @property
    def rows_address(self) -> int | None:
        """Address of the current step's tokens, as compiled kernels take it."""
        return None if self.rows is None else addressof(self.rows.struct)

    def packed(self, layers: Sequence[nn.Module]) -> PackedLowRank | None:
        """Return the updates of layers whose matrices are stacked; ``None`` without any."""
        updates = [self._layers.get(layer, {}) for layer in layers]
        return PackedLowRank(updates, layers, len(self.names)) if any(updates) else None

    def wrap(self, model: nn.Module) -> None:
        """Wrap the layers with updates that no compiled kernel replaced.

        Call it last: it frees the references to all layers and updates.
        """
        found = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if child in self._layers
        ]
        for parent, name, child in found:
            setattr(parent, name, AdaptedLinear(child, self._layers[child], self))
        self._layers = {}


NO_ADAPTERS = AdapterSet((), {})
"""Of an engine that serves the base model alone."""


class AdaptedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer and the updates of its adapters, computed by torch.

    Args:
        base: the layer.
        updates: by number of the adapter.
        adapters: that know the current step.
    """

    def __init__(self, base: nn.Module, updates: Mapping[int, LowRank], adapters: AdapterSet) -> None:
        super().__init__()
        self.base = base
        self._updates, self._adapters = updates, adapters

    def forward(self, x: Tensor) -> Tensor:
        """Return (1, tokens, out) of (1, tokens, in)."""
        y: Tensor = self.base(x)
        rows = self._adapters.rows
        for number, tokens in rows.groups if rows is not None else ():
            if (update := self._updates.get(number)) is not None:
                more = x[:, tokens].float() @ update.down.t() @ update.up.t()
                y[:, tokens] = (y[:, tokens] + more).to(y.dtype)
        return y


class PackedLowRank:
    """Updates of stacked layers by adapter, as ``native.c`` takes them.

    Args:
        updates: of each layer, by number of the adapter.
        layers: linear ones.
        num_adapters: of the engine.
    """

    def __init__(
        self, updates: Sequence[Mapping[int, LowRank]], layers: Sequence[nn.Module], num_adapters: int
    ) -> None:
        columns = [_num_outputs(layer) for layer in layers]
        self._structs: Array[LowRankStruct] = (LowRankStruct * num_adapters)()
        self._kept: list[PackedMatrix] = []
        for number in sorted({number for each in updates for number in each}):
            self._structs[number] = self._pack([each.get(number) for each in updates], columns)

    @property
    def address(self) -> int:
        """Address of the array, an element an adapter."""
        return addressof(self._structs)

    def _pack(self, updates: Sequence[LowRank | None], columns: Sequence[int]) -> LowRankStruct:
        """Return one adapter's updates as one: ``down`` stacked, ``up`` block-diagonal."""
        down = PackedMatrix([update.down for update in updates if update is not None], [None] * len(updates))
        up, row, rank = torch.zeros((sum(columns), down.out)), 0, 0
        for update, count in zip(updates, columns, strict=True):
            if update is not None:
                up[row : row + count, rank : rank + len(update.down)] = update.up
                rank += len(update.down)
            row += count
        packed = PackedMatrix([up], [None])
        self._kept += [down, packed]
        return LowRankStruct(_copy(down.struct), _copy(packed.struct))


def _copy(struct: LinearStruct) -> LinearStruct:
    return LinearStruct.from_buffer_copy(struct)


def _num_outputs(layer: nn.Module) -> int:
    count: int = layer.out_features if hasattr(layer, "out_features") else layer.nf
    return count
