"""Replace layers of a stock model by ones computed in ``native.c``, where results agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ctypes import byref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from launcher.errors import EnvironmentProblem
from launcher.inference.kernels.low_rank import NO_ADAPTERS, AdapterSet, PackedLowRank
from launcher.inference.kernels.native import (
    MAX_GROUP_SIZE,
    VECTOR_WIDTH,
    BlockStruct,
    NativeAttention,
    PackedMatrix,
    PackedQuantizedMatrix,
    Scratch,
    TokensStruct,
    is_packable,
    native_library,
    pack_layers,
)
from launcher.inference.kernels.semi_structured import replace_by_semi_structured
from launcher.models.layers import blocks
from launcher.quantization.codecs import is_quantized
from launcher.utils.text import bytes_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class KVArenas(Protocol):
    """Keys and values of all sequences, as the engine's paged cache holds them."""

    keys: dict[int, Tensor]
    """By number of layer: (tokens of all blocks, heads, head size)."""
    values: dict[int, Tensor]
    kernels: NativeAttention | None
    """Computes attention over them; ``None`` is torch's."""


class NativeStep(Protocol):
    """Where the tokens of one step are, as the engine gives it to layers."""

    @property
    def cache(self) -> KVArenas:
        """Keys and values of all sequences."""

    def native(self, rotary: tuple[Tensor, Tensor] | None = None) -> TokensStruct:
        """Return the step as compiled kernels take it."""


class NativeLinear(nn.Module):  # type: ignore[misc]
    """A matrix product.

    Args:
        packed: the matrix.
        dtype: what goes in and comes out: bf16 or fp32, which a matrix that is not quantized is of, too.
        scratch: shared room.
        adapters: those of the engine, which know the current step.
        low_rank: their updates of the matrix; ``None`` where they have none.
    """

    def __init__(
        self,
        packed: PackedMatrix | PackedQuantizedMatrix,
        dtype: torch.dtype,
        scratch: Scratch,
        *,
        adapters: AdapterSet = NO_ADAPTERS,
        low_rank: PackedLowRank | None = None,
    ) -> None:
        super().__init__()
        self.matrices, self._scratch = [packed], scratch
        self._adapters, self._low_rank = adapters, low_rank
        self._updates = _address(low_rank)
        self._half = int(dtype == torch.bfloat16)
        self._call = native_library().native_linear

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) of (…, in)."""
        (packed,) = self.matrices
        x = x.contiguous()
        rows = x.numel() // packed.inner
        y = x.new_empty((*x.shape[:-1], packed.columns))
        scratch = self._scratch.of(rows * (packed.inner + packed.out))
        self._call(
            byref(packed.struct),
            self._updates,
            self._adapters.rows_address,
            x.data_ptr(),
            y.data_ptr(),
            rows,
            packed.columns,
            scratch,
            self._half,
        )
        return y


class NativeBlock(nn.Module):  # type: ignore[misc]
    """A Llama block: RMS norms, rotary positions, grouped queries, gated MLP with SiLU.

    Args:
        block: the stock one.
        scratch: shared room.
        adapters: those of the engine.
        sparse: whether matrices that are 2:4 are kept without their zeros.

    Attributes:
        matrices: of the block.
    """

    def __init__(
        self, block: nn.Module, scratch: Scratch, adapters: AdapterSet = NO_ADAPTERS, *, sparse: bool = True
    ) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        stacks = (inputs, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])
        self.matrices = [pack_layers(layers, sparse=sparse) for layers in stacks]
        self._qkv, self._o, self._gate_up, self._down = self.matrices
        self._adapters, self._low_rank = adapters, [adapters.packed(layers) for layers in stacks]
        self._norms = [norm.weight.detach().float() for norm in (block.input_layernorm, block.post_attention_layernorm)]
        dim, width = attention.head_dim, attention.q_proj.in_features
        heads, kv_heads = (layer.out_features // dim for layer in inputs[:2])
        self._layer, self._scratch, self._call = attention.layer_idx, scratch, native_library().native_block
        self._struct = BlockStruct(
            self._qkv.struct,
            self._o.struct,
            self._gate_up.struct,
            self._down.struct,
            *map(_address, self._low_rank),
            *(norm.data_ptr() for norm in self._norms),
            block.input_layernorm.variance_epsilon,
            block.post_attention_layernorm.variance_epsilon,
            attention.scaling,
            int(block.input_layernorm.weight.dtype == torch.bfloat16),
            width,
            heads,
            kv_heads,
            dim,
            mlp.gate_proj.out_features,
        )
        self._floats = 2 * width + self._qkv.out + heads * dim + self._gate_up.out

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        launcher_step: NativeStep,
        **_: Any,
    ) -> Tensor:
        """Return hidden states (1, tokens, width), having written keys and values."""
        cache = launcher_step.cache
        tokens = launcher_step.native(position_embeddings)
        hidden_states = hidden_states.contiguous()
        out = torch.empty_like(hidden_states)
        self._call(
            byref(self._struct),
            byref(tokens),
            self._adapters.rows_address,
            cache.keys[self._layer].data_ptr(),
            cache.values[self._layer].data_ptr(),
            hidden_states.data_ptr(),
            out.data_ptr(),
            self._scratch.of(hidden_states.shape[1] * self._floats),
        )
        return out


_PARTS = ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
_PANEL = 32
"""Outputs in the widest panel of any machine."""


class ReplacedLayers:
    """Replaced layers and their originals.

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


def replace_layers(
    model: PreTrainedModel,
    cache: KVArenas,
    *,
    adapters: AdapterSet = NO_ADAPTERS,
    sparse: bool = True,
    heartbeat: Callable[[], None] = lambda: None,
) -> ReplacedLayers:
    """Replace what can be replaced.

    Args:
        model: in inference mode; on the CPU in bf16 or fp32. Of models on a GPU the 2:4 matrices alone are replaced.
        cache: whose attention is computed by kernels too.
        adapters: whose updates of replaced layers are computed by kernels too.
        sparse: whether matrices that are 2:4 are kept without their zeros.
        heartbeat: called while the kernels are compiled.
    """
    swapped = ReplacedLayers()
    if model.device.type == "cuda":
        swapped.what = "the model's own layers"
        if sparse and not adapters.names and (count := replace_by_semi_structured(model, swapped.put)):
            swapped.what += f", {count} of them as 2:4 matrices by torch's semi-structured kernels"
        return swapped
    if model.device.type != "cpu" or model.dtype not in (torch.bfloat16, torch.float32):
        swapped.what = "the model's own layers"
        return swapped
    try:
        native_library(heartbeat)
    except EnvironmentProblem as problem:
        swapped.what = f"the model's own layers, several times slower than compiled ones would be: {problem}"
        return swapped
    scratch = Scratch()
    widths = {(*cache.keys[layer].shape[1:], *cache.values[layer].shape[1:]) for layer in cache.keys}
    heads = model.config.get_text_config().num_attention_heads
    if all(
        keys == values and dim % VECTOR_WIDTH == 0 and heads // keys_heads <= MAX_GROUP_SIZE
        for keys_heads, dim, *rest in widths
        for keys, values in [((keys_heads, dim), tuple(rest))]
    ):
        cache.kernels = NativeAttention(scratch)
    layers = blocks(model)
    is_llama = cache.kernels is not None and all(_is_llama_block(block) for block in layers)
    if is_llama:
        for block in layers:
            parent, name = _parent_of(model, block)
            swapped.put(parent, name, NativeBlock(block, scratch, adapters, sparse=sparse))
            heartbeat()
    matrices = list(_matrices(model))
    for parent, name, child in matrices:
        packed = (
            pack_layers([child], sparse=sparse)
            if is_packable(child)
            else PackedMatrix([_weight(child)], [child.bias], sparse=sparse)
        )
        low_rank = adapters.packed([child])
        swapped.put(parent, name, NativeLinear(packed, model.dtype, scratch, adapters=adapters, low_rank=low_rank))
        heartbeat()
    swapped.what = f"{len(layers) if is_llama else 0} blocks and {len(matrices)} single matrices by compiled kernels"
    swapped.what += _sparse_part(model)
    if others := sum(is_quantized(layer) for layer in model.modules()):
        swapped.what += f"; {others} quantized layers by their library's own, which may be slower"
    return swapped


def replace_quantized_layers(
    model: nn.Module, dtype: torch.dtype, *, heartbeat: Callable[[], None] = lambda: None
) -> ReplacedLayers:
    """Replace the quantized layers alone, on a CPU and where kernels support them."""
    swapped = ReplacedLayers()
    found = [(name, layer) for name, layer in model.named_modules() if is_packable(layer)]
    if not found or next(model.parameters()).device.type != "cpu":
        return swapped
    try:
        native_library(heartbeat)
    except EnvironmentProblem as problem:
        swapped.what = f"quantized layers are computed by their library's own: {problem}"
        return swapped
    scratch = Scratch()
    for name, layer in found:
        parent, _, key = name.rpartition(".")
        swapped.put(model.get_submodule(parent), key, NativeLinear(pack_layers([layer], sparse=True), dtype, scratch))
        heartbeat()
    swapped.what = f"{len(found)} quantized layers are computed by the engine's kernels"
    return swapped


def _sparse_part(model: nn.Module) -> str:
    """Return in words how many matrices are kept without their zeros; nothing if none is."""
    kept = [
        each for layer in model.modules() if isinstance(layer, NativeBlock | NativeLinear) for each in layer.matrices
    ]
    sparse = [each for each in kept if each.is_sparse]
    if not sparse:
        return ""
    size = bytes_text(sum(each.weight.nbytes for each in sparse))
    return f"; {len(sparse)} of {len(kept)} matrices are 2:4 and stored without their zeros, in {size}"


def _is_llama_block(block: nn.Module) -> bool:
    """Return whether a block has exactly the parts of ``NativeBlock``.

    Results are compared too.
    """
    if [name for name, _ in block.named_children()] != _PARTS:
        return False
    attention, mlp = block.self_attn, block.mlp
    norms = (block.input_layernorm, block.post_attention_layernorm)
    linears = [getattr(attention, name, None) for name in _PROJECTIONS]
    linears += [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not (
        sorted(name for name, _ in attention.named_children()) == sorted(_PROJECTIONS)
        and (all(map(_is_plain, linears)) or all(map(is_packable, linears)))
        and isinstance(getattr(mlp, "act_fn", None), nn.SiLU | type(_silu()))
        and all(hasattr(norm, "variance_epsilon") and not list(norm.children()) for norm in norms)
    ):
        return False
    dim, width = attention.head_dim, attention.q_proj.in_features
    heads, kv_heads = attention.q_proj.out_features // dim, attention.k_proj.out_features // dim
    return (
        attention.v_proj.out_features == kv_heads * dim
        and heads % kv_heads == 0
        and heads // kv_heads <= MAX_GROUP_SIZE
        and not any(size % _PANEL for size in (dim, width, mlp.gate_proj.out_features))
    )


def _address(low_rank: PackedLowRank | None) -> int | None:
    return None if low_rank is None else low_rank.address


def _silu() -> nn.Module:
    from transformers.activations import ACT2FN

    made: nn.Module = ACT2FN["silu"]
    return made


def _parent_of(model: nn.Module, wanted: nn.Module) -> tuple[nn.Module, str]:
    """Return whose child a module is, and under which name."""
    return next(
        (parent, name) for parent in model.modules() for name, child in parent.named_children() if child is wanted
    )


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        for name, child in module.named_children():
            if _is_plain(child) or isinstance(child, Conv1D) or is_packable(child):
                yield module, name, child


def _is_plain(layer: nn.Module | None) -> bool:
    """Whether a layer is linear with a matrix of floats."""
    return type(layer) is nn.Linear and not is_quantized(layer)


def _weight(layer: nn.Module) -> torch.Tensor:
    """Return (out, in) of a layer; Conv1D keeps it the other way round."""
    weight: torch.Tensor = layer.weight
    return weight if isinstance(layer, nn.Linear) else weight.t()
