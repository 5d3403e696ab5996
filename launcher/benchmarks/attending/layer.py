"""Self-attention between its two projections, the same weights under every kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from launcher.compile import quote_torch_libraries
from launcher.engines.distributed import DTYPES

Attend = Callable[[nn.MultiheadAttention, Tensor], Tensor]
"""From hidden states (sequences, tokens, width) to the layer's output, of the same shape."""


def start(
    *, batch: int, sequence: int, width: int, heads: int, precision: str, seed: int, rank: int
) -> tuple[nn.MultiheadAttention, Tensor, Tensor]:
    """Return the layer, its input and the gradient that comes in at its output: the same numbers in every process."""
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(width, heads, batch_first=True)
    for bias in (layer.in_proj_bias, layer.out_proj.bias):
        nn.init.uniform_(bias, -0.1, 0.1)  # zeros would hide one that is left out
    inputs, incoming = (torch.randn(batch, sequence, width) for _ in range(2))
    to = {"device": device, "dtype": DTYPES[precision]}
    return layer.to(**to), inputs.to(**to), incoming.to(**to)


def heads_of(layer: nn.MultiheadAttention, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as views of one projection, each (sequences, heads, tokens, head width)."""
    together = functional.linear(hidden, layer.in_proj_weight, layer.in_proj_bias)
    query, key, value = together.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return query, key, value


def merged(values: Tensor) -> Tensor:
    """Return (sequences, heads, tokens, head width) as (sequences, tokens, width)."""
    return values.transpose(1, 2).flatten(2)


def _torchs(layer: nn.MultiheadAttention, hidden: Tensor, *, need_weights: bool, training: bool) -> Tensor:
    layer.train(training)  # there is no dropout: this only decides which code torch takes
    output: Tensor = layer(hidden, hidden, hidden, need_weights=need_weights)[0]
    return output


def _between(kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    def attend(layer: nn.MultiheadAttention, hidden: Tensor) -> Tensor:
        output: Tensor = layer.out_proj(merged(kernel(*heads_of(layer, hidden))))
        return output

    return attend


def _eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale = 1 / math.sqrt(query.shape[-1])
    return ((query * scale) @ key.transpose(-2, -1)).softmax(-1) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(query, key, value)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    quote_torch_libraries()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    output: Tensor = _compiled_flex()(query, key, value)
    return output


ATTEND: dict[str, Attend] = {
    "mha_weights": functools.partial(_torchs, need_weights=True, training=True),
    "mha": functools.partial(_torchs, need_weights=False, training=True),
    "mha_eval": functools.partial(_torchs, need_weights=False, training=False),
    "eager": _between(_eager),
    "sdpa_math": _between(functools.partial(_sdpa, backend=SDPBackend.MATH)),
    "sdpa_flash": _between(functools.partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION)),
    "flex": _between(_flex),
}
"""By name of the kernel."""


def take(
    kernel: str, layer: nn.MultiheadAttention, inputs: Tensor, incoming: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Compute the output and, where a gradient comes in, the gradients of the input and of all weights.

    Gradients of weights are added to what is there: cleared, but not given back, they are no part of a peak.
    """
    if incoming is None:
        with torch.no_grad():
            return ATTEND[kernel](layer, inputs), None
    leaf = inputs.detach().requires_grad_()
    output = ATTEND[kernel](layer, leaf)
    output.backward(incoming)
    return output.detach(), leaf.grad
