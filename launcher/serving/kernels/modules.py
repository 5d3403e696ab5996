"""Layers that take the place of stock ones and compute in ``native.c``."""

from __future__ import annotations

from ctypes import byref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.serving.kernels.library import Block, native
from launcher.serving.kernels.packing import Packed, PackedFew, Scratch, pack

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.serving.kv import PagedCache, Step


class NativeLinear(nn.Module):  # type: ignore[misc]
    """A matrix product.

    Args:
        packed: the matrix.
        dtype: what goes in and comes out: bf16 or fp32, which a matrix that is not quantised is of, too.
        scratch: shared room.
    """

    def __init__(self, packed: Packed | PackedFew, dtype: torch.dtype, scratch: Scratch) -> None:
        super().__init__()
        self._packed, self._scratch = packed, scratch
        self._half = int(dtype == torch.bfloat16)
        self._call = native().native_linear

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) of (…, in)."""
        packed = self._packed
        x = x.contiguous()
        rows = x.numel() // packed.inner
        y = x.new_empty((*x.shape[:-1], packed.columns))
        scratch = self._scratch.of(rows * (packed.inner + packed.out))
        self._call(byref(packed.struct), x.data_ptr(), y.data_ptr(), rows, packed.columns, scratch, self._half)
        return y


class NativeBlock(nn.Module):  # type: ignore[misc]
    """A decoder block of Llama's make: RMS norms, rotary positions, grouped queries, gated MLP with SiLU.

    Args:
        block: the stock one.
        scratch: shared room.
    """

    def __init__(self, block: nn.Module, scratch: Scratch) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._qkv, self._o, self._gate_up, self._down = (
            pack(layers) for layers in (inputs, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])
        )
        self._norms = [norm.weight.detach().float() for norm in (block.input_layernorm, block.post_attention_layernorm)]
        dim, width = attention.head_dim, attention.q_proj.in_features
        heads, kv_heads = (layer.out_features // dim for layer in inputs[:2])
        self._layer, self._scratch, self._call = attention.layer_idx, scratch, native().native_block
        self._struct = Block(
            self._qkv.struct,
            self._o.struct,
            self._gate_up.struct,
            self._down.struct,
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
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], launcher_step: Step, **_: Any
    ) -> Tensor:
        """Return hidden states (1, tokens, width), having written keys and values."""
        cache: PagedCache = launcher_step.cache
        tokens = launcher_step.native(position_embeddings)
        hidden_states = hidden_states.contiguous()
        out = torch.empty_like(hidden_states)
        self._call(
            byref(self._struct),
            byref(tokens),
            cache.keys[self._layer].data_ptr(),
            cache.values[self._layer].data_ptr(),
            hidden_states.data_ptr(),
            out.data_ptr(),
            self._scratch.of(hidden_states.shape[1] * self._floats),
        )
        return out
