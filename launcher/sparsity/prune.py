"""Prune a model in place, each block on the outputs of the pruned blocks before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from launcher.config.sparsity import OWL_M, CalibratedPruning, Pruning
from launcher.errors import ConfigError, ConfigErrors, JobError
from launcher.models.layers import blocks
from launcher.quantization.layers import matrices, matrix_size
from launcher.sparsity.methods import InputNorms, InputStatistics, pruned, statistics_of, wanda_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class CalibrationBatch:
    """Sequences of one length, without padding."""

    input_ids: Tensor
    """int64 (sequences, tokens)."""
    position_ids: Tensor | None = None
    """int64, of the same shape; ``None``: 0, 1, 2, … in every row."""


def targets(model: nn.Module, method: Pruning) -> dict[str, nn.Module]:
    """Return the layers to prune, by name.

    Args:
        model: with or without storage.
        method: what to skip, and the pattern.

    Raises:
        ConfigErrors: the model has none, or the pattern does not fit one.
    """
    family = type(model).__name__
    found = matrices(model)
    if not found:
        why = f"the blocks of {family} hold no linear layers"
        raise ConfigError("sparsity", method.kind, why=why, fix="choose another model")
    sizes = {name: matrix_size(layer) for name, layer in found.items()}
    if errors := list(method.validate_matrices(sizes, family=family)):
        raise ConfigErrors(errors)
    return {name: found[name] for name in method.selected(list(found), family=family)}


def prune_model(
    model: PreTrainedModel,
    method: Pruning,
    batches: Sequence[CalibrationBatch],
    *,
    heartbeat: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Prune a model in place; return the share of zeros of each matrix, by its layer's name.

    Like the reference implementations (github.com/locuslab/wanda, github.com/IST-DASLab/sparsegpt), a block is
    calibrated on what the pruned blocks before it return, and all matrices of a block on the same pass.

    Args:
        model: in inference mode, not quantized.
        method: of pruning.
        batches: calibration text; empty for a method without calibration.
        heartbeat: called at least every few seconds.
        say: called with a line for each block.

    Raises:
        ConfigErrors: the pattern does not fit a matrix.
        JobError: the inputs of a layer are not finite, or a matrix would be empty.
    """
    layers = targets(model, method)
    with torch.no_grad():
        if isinstance(method, CalibratedPruning):
            _prune_calibrated(model, method, layers, batches, heartbeat=heartbeat, say=say)
        else:
            for name, layer in layers.items():
                _prune_layer(layer, method, name, share=method.zero_share, inputs=None)
                heartbeat()
    return {name: zero_share(layer) for name, layer in layers.items()}


def zero_share(layer: nn.Module) -> float:
    """Return the share of a layer's weights that are zero."""
    weight: Tensor = layer.weight
    share: float = 1 - int(weight.count_nonzero()) / weight.numel()
    return share


def _prune_layer(layer: nn.Module, method: Pruning, name: str, *, share: float, inputs: InputStatistics | None) -> None:
    is_transposed = isinstance(layer, Conv1D)
    weight: Tensor = layer.weight.t() if is_transposed else layer.weight
    made = pruned(weight, method, share=share, inputs=inputs, name=name)
    if not bool(made.any()):
        raise JobError(f"sparsity: {name} has no weight left that is not zero; set sparsity.ratio to less, or skip it")
    if not bool(torch.isfinite(made).all()):
        raise JobError(f"sparsity: {name} has weights that are not finite; check the weights of the model")
    weight.copy_(made)


def _prune_calibrated(
    model: PreTrainedModel,
    method: CalibratedPruning,
    layers: Mapping[str, nn.Module],
    batches: Sequence[CalibrationBatch],
    *,
    heartbeat: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    parts = blocks(model)
    inside = [_layers_in(block, layers) for block in parts]
    if outside := sorted(layers.keys() - {name for found in inside for name in found}):
        why = f"{outside[0]} is outside of the model's blocks, which are calibrated one after the other"
        fix = f"leave it as it is with 'sparsity.skip=[\"{outside[0]}\"]', or set sparsity=magnitude"
        raise ConfigError("sparsity", method.kind, why=why, fix=fix)
    is_owl = method.allocation == "owl"
    calls, norms = _first_pass(model, parts, layers if is_owl else {}, batches, heartbeat=heartbeat)
    shares = [method.zero_share] * len(parts)
    if is_owl:
        m = OWL_M if method.owl_m is None else method.owl_m
        outliers = {number: _outlier_share(found, norms, m=m) for number, found in enumerate(inside) if found}
        chosen = owl_shares(list(outliers.values()), share=method.zero_share, spread=method.spread)
        for number, share in zip(outliers, chosen, strict=True):
            shares[number] = share
        del norms
    hidden = [call.hidden for call in calls]
    for number, (block, found, share) in enumerate(zip(parts, inside, shares, strict=True)):
        if found:
            statistics = _collect(block, found, method, hidden, [call.of(number) for call in calls], heartbeat)
            for name, layer in found.items():
                _prune_layer(layer, method, name, share=share, inputs=statistics.pop(name))
                heartbeat()
        if number + 1 < len(parts):
            for at, call in enumerate(calls):
                hidden[at] = call.of(number).run(block, hidden[at])
                heartbeat()
        zeros = f": {share:.1%} zeros" if is_owl and found else ""
        say(f"block {number + 1} of {len(parts)}{zeros}")


def _layers_in(block: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    own = {id(module) for module in block.modules()}
    return {name: layer for name, layer in layers.items() if id(layer) in own}


@dataclass(frozen=True, kw_only=True)
class _BlockCall:
    """Arguments of a block besides hidden states."""

    rest: tuple[Any, ...]
    named: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the block's hidden states."""
        answer = block(hidden, *self.rest, **self.named)
        found: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return found


class _ModelCall:
    """What the blocks of a model got in one forward pass."""

    def __init__(self, blocks_of_model: Sequence[nn.Module]) -> None:
        self.hidden: Tensor
        """Hidden states before the first block."""
        self._number = {id(block): number for number, block in enumerate(blocks_of_model)}
        self._calls: dict[int, _BlockCall] = {}

    def record(self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Take the arguments of a block: a hook."""
        number = self._number[id(block)]
        if not args:
            args, named = (named["hidden_states"],), {k: v for k, v in named.items() if k != "hidden_states"}
        if number == 0:
            self.hidden = args[0]
        self._calls[number] = _BlockCall(rest=args[1:], named=named)

    def of(self, number: int) -> _BlockCall:
        """Return the call of a block."""
        return self._calls[number]


def _first_pass(
    model: PreTrainedModel,
    parts: Sequence[nn.Module],
    layers: Mapping[str, nn.Module],
    batches: Sequence[CalibrationBatch],
    *,
    heartbeat: Callable[[], None],
) -> tuple[list[_ModelCall], dict[str, InputStatistics]]:
    """Run the model as it is; return its calls of blocks, and the norms of the layers' inputs."""
    calls = []
    norms = {name: InputNorms() for name in layers}
    with _hooked({layer: norms[name] for name, layer in layers.items()}):
        for batch in batches:
            call = _ModelCall(parts)
            hooks = [block.register_forward_pre_hook(call.record, with_kwargs=True) for block in parts]
            where = batch.position_ids
            positions = {} if where is None else {"position_ids": where.to(model.device)}
            try:
                model.base_model(input_ids=batch.input_ids.to(model.device), use_cache=False, **positions)
            finally:
                for hook in hooks:
                    hook.remove()
            calls.append(call)
            heartbeat()
    return calls, dict(norms)


@contextmanager
def _hooked(statistics: Mapping[nn.Module, InputStatistics]) -> Iterator[None]:
    """Add the inputs of layers to their statistics, each of which may be shared."""
    leaders: dict[int, nn.Module] = {}  # the first layer of each

    def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
        found = statistics[layer]
        if leaders.setdefault(id(found), layer) is layer:
            found.add(args[0])

    hooks = [layer.register_forward_pre_hook(add) for layer in statistics]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _collect(
    block: nn.Module,
    layers: Mapping[str, nn.Module],
    method: Pruning,
    hidden: Sequence[Tensor],
    calls: Sequence[_BlockCall],
    heartbeat: Callable[[], None],
) -> dict[str, InputStatistics]:
    """Return the statistics of a block's layers; those that take the same tensor share one."""
    same = _sharing(block, layers, hidden[0], calls[0])
    made = {leader: statistics_of(method) for leader in dict.fromkeys(same.values())}
    with _hooked({layer: made[same[name]] for name, layer in layers.items()}):
        for states, call in zip(hidden, calls, strict=True):
            call.run(block, states)
            heartbeat()
    found = {name: made[same[name]] for name in layers}
    for name, statistics in found.items():
        if not statistics.num_rows:
            fix = "set it to more, or leave the layer as it is with sparsity.skip"
            raise JobError(f"sparsity.calibration_sequences: no token of the text reaches {name}; {fix}")
    return found


def _sharing(block: nn.Module, layers: Mapping[str, nn.Module], hidden: Tensor, call: _BlockCall) -> dict[str, str]:
    """Return, for each layer of a block, the first one that takes the very same tensor."""
    seen: list[tuple[Tensor, str]] = []  # tensors are held, so that no other takes their place
    found = {name: name for name in layers}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            found[name] = next((first for tensor, first in seen if tensor is args[0]), name)
            seen.append((args[0], name))

        return look

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        call.run(block, hidden)
    finally:
        for each in hooks:
            each.remove()
    return found


def _outlier_share(layers: Mapping[str, nn.Module], norms: Mapping[str, InputStatistics], *, m: float) -> float:
    """Return the share of a block's weights whose Wanda score is over ``m`` times their mean."""
    total, number, above = 0.0, 0, 0
    scores = {name: wanda_scores(_matrix(layer).float(), norms[name]) for name, layer in layers.items()}
    for each in scores.values():
        total, number = total + float(each.double().sum()), number + each.numel()
    for each in scores.values():
        above += int((each > m * total / number).sum())
    return above / number


def _matrix(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
    return weight


def owl_shares(outliers: Sequence[float], *, share: float, spread: float) -> list[float]:
    """Return the share of zeros of each block by OWL.

    Yin et al., 2024, arXiv:2310.05175, section 3.

    Blocks with more outliers keep more weights. As in github.com/luuyin/OWL, kept shares differ by ``spread`` (2 λ)
    between the blocks with the most and the fewest outliers.

    Args:
        outliers: share of each block's weights that are outliers.
        share: of zeros, on average.
        spread: of the shares.
    """
    low, high = min(outliers), max(outliers)
    if low == high:
        return [share] * len(outliers)
    kept = [(each - low) / (high - low) * spread for each in outliers]
    mean = sum(kept) / len(kept)
    return [share + mean - each for each in kept]
