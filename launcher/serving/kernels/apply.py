"""Which layers of a stock model are computed by ``native.c``: known by what they are made of, proved by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from launcher.errors import EnvironmentProblem
from launcher.models.units import blocks
from launcher.quantization.codecs import is_quantised
from launcher.serving.kernels.attention import MOST_SHARING, VECTOR, NativeAttention
from launcher.serving.kernels.library import native
from launcher.serving.kernels.modules import NativeBlock, NativeLinear
from launcher.serving.kernels.packing import Packed, Scratch, is_few, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.serving.kv import PagedCache

_PARTS = ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
_PANEL = 32
"""Outputs in the widest panel of any machine."""


class Swapped:
    """What has been put in place of what.

    Attributes:
        what: in words.
    """

    def __init__(self) -> None:
        self.what = ""
        self._old: list[tuple[nn.Module, str, nn.Module]] = []

    def put(self, parent: nn.Module, name: str, new: nn.Module) -> None:
        """Replace one module."""
        self._old.append((parent, name, getattr(parent, name)))
        setattr(parent, name, new)

    def undo(self) -> None:
        """Put everything back."""
        for parent, name, old in reversed(self._old):
            setattr(parent, name, old)


def apply_native(model: PreTrainedModel, cache: PagedCache, *, beat: Callable[[], None] = lambda: None) -> Swapped:
    """Replace what can be replaced.

    Args:
        model: on the CPU, in inference mode, in bf16 or fp32; other models stay as they are.
        cache: whose attention is computed by kernels too.
        beat: called while the kernels are compiled.
    """
    swapped = Swapped()
    if model.device.type != "cpu" or model.dtype not in (torch.bfloat16, torch.float32):
        swapped.what = "the model's own layers"
        return swapped
    try:
        native(beat)
    except EnvironmentProblem as problem:
        swapped.what = f"the model's own layers, several times slower than compiled ones would be: {problem}"
        return swapped
    scratch = Scratch()
    widths = {(*cache.keys[layer].shape[1:], *cache.values[layer].shape[1:]) for layer in cache.keys}
    heads = model.config.get_text_config().num_attention_heads
    if all(
        keys == values and dim % VECTOR == 0 and heads // keys_heads <= MOST_SHARING
        for keys_heads, dim, *rest in widths
        for keys, values in [((keys_heads, dim), tuple(rest))]
    ):
        cache.kernels = NativeAttention(scratch)
    layers = blocks(model)
    is_llama = cache.kernels is not None and all(_of_llamas_make(block) for block in layers)
    if is_llama:
        for block in layers:
            parent, name = _place(model, block)
            swapped.put(parent, name, NativeBlock(block, scratch))
            beat()
    matrices = list(_matrices(model))
    for parent, name, child in matrices:
        packed = pack([child]) if is_few(child) else Packed([_weight(child)], [child.bias])
        swapped.put(parent, name, NativeLinear(packed, model.dtype, scratch))
        beat()
    swapped.what = f"{len(layers) if is_llama else 0} blocks and {len(matrices)} single matrices by compiled kernels"
    if others := sum(is_quantised(layer) for layer in model.modules()):
        swapped.what += f"; {others} quantised layers by their library's own, which may be slower"
    return swapped


def apply_to_few(model: nn.Module, dtype: torch.dtype, *, beat: Callable[[], None] = lambda: None) -> Swapped:
    """Replace the quantised layers alone, where they are on a CPU and kernels multiply them; the rest stays."""
    swapped = Swapped()
    found = [(name, layer) for name, layer in model.named_modules() if is_few(layer)]
    if not found or next(model.parameters()).device.type != "cpu":
        return swapped
    try:
        native(beat)
    except EnvironmentProblem as problem:
        swapped.what = f"quantised layers are computed by their library's own: {problem}"
        return swapped
    scratch = Scratch()
    for name, layer in found:
        parent, _, key = name.rpartition(".")
        swapped.put(model.get_submodule(parent), key, NativeLinear(pack([layer]), dtype, scratch))
        beat()
    swapped.what = f"{len(found)} quantised layers are computed by the engine's kernels"
    return swapped


def _of_llamas_make(block: nn.Module) -> bool:
    """Whether a block has the parts that ``NativeBlock`` computes, and no others; results are compared besides."""
    if [name for name, _ in block.named_children()] != _PARTS:
        return False
    attention, mlp = block.self_attn, block.mlp
    norms = (block.input_layernorm, block.post_attention_layernorm)
    linears = [getattr(attention, name, None) for name in _PROJECTIONS]
    linears += [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not (
        sorted(name for name, _ in attention.named_children()) == sorted(_PROJECTIONS)
        and (all(map(_is_plain, linears)) or all(map(is_few, linears)))
        and isinstance(getattr(mlp, "act_fn", None), nn.SiLU | type(_silu()))
        and all(hasattr(norm, "variance_epsilon") and not list(norm.children()) for norm in norms)
    ):
        return False
    dim, width = attention.head_dim, attention.q_proj.in_features
    heads, kv_heads = attention.q_proj.out_features // dim, attention.k_proj.out_features // dim
    return (
        attention.v_proj.out_features == kv_heads * dim
        and heads % kv_heads == 0
        and heads // kv_heads <= MOST_SHARING
        and not any(size % _PANEL for size in (dim, width, mlp.gate_proj.out_features))
    )


def _silu() -> nn.Module:
    from transformers.activations import ACT2FN

    made: nn.Module = ACT2FN["silu"]
    return made


def _place(model: nn.Module, wanted: nn.Module) -> tuple[nn.Module, str]:
    """Return whose child a module is, and under which name."""
    return next(
        (parent, name) for parent in model.modules() for name, child in parent.named_children() if child is wanted
    )


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        for name, child in module.named_children():
            if _is_plain(child) or isinstance(child, Conv1D) or is_few(child):
                yield module, name, child


def _is_plain(layer: nn.Module | None) -> bool:
    """Whether a layer is linear with a matrix of floats."""
    return type(layer) is nn.Linear and not is_quantised(layer)


def _weight(layer: nn.Module) -> torch.Tensor:
    """Return (out, in) of a layer; Conv1D keeps it the other way round."""
    weight: torch.Tensor = layer.weight
    return weight if isinstance(layer, nn.Linear) else weight.t()
