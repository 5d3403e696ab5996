"""The reference: attention in fp64 by its formula, a block of queries at a time, so that it fits where kernels do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from launcher.benchmarks.attending.layer import heads_of, merged, start

_SCORES_AT_ONCE = 2**24
"""128 MiB of fp64."""


def exact(*, keep: Mapping[str, str], backward: bool, progress: Callable[[], None], **sizes: Any) -> dict[str, Any]:
    """Write output and gradient of the input, computed in fp64 from the numbers that kernels start from, into files.

    Args:
        keep: file by tokens of a sequence, whose number is text as JSON has it.
        backward: whether there is a gradient.
        progress: called from time to time.
        sizes: as ``launcher.benchmarks.attending.layer.start`` takes them, but for the sequence.
    """
    from safetensors.torch import save_file

    for tokens, file in keep.items():
        layer, inputs, incoming = start(sequence=int(tokens), **sizes)
        layer, inputs = layer.double().requires_grad_(False), inputs.double().requires_grad_(backward)
        output = layer.out_proj(merged(_attention(*heads_of(layer, inputs), progress)))
        found = {"output": output.detach().cpu()}
        if backward:
            output.backward(incoming.double())
            assert inputs.grad is not None, "the output depends on the input"
            found["gradient"] = inputs.grad.cpu()
        save_file(found, file)
    return {}


def _attention(query: Tensor, key: Tensor, value: Tensor, progress: Callable[[], None]) -> Tensor:
    """Return softmax(QK^T / sqrt(d))V for tensors of shape (sequences, heads, tokens, head width)."""
    _, heads, tokens, _ = query.shape
    rows = max(1, _SCORES_AT_ONCE // (heads * tokens))
    items = []
    for number in range(len(query)):
        one = slice(number, number + 1)
        blocks = [
            checkpoint(_block, part, key[one], value[one], progress, use_reentrant=False)
            for part in query[one].split(rows, dim=2)
        ]
        items.append(torch.cat(blocks, dim=2))
    return torch.cat(items)


def _block(query: Tensor, key: Tensor, value: Tensor, progress: Callable[[], None]) -> Tensor:
    progress()
    return ((query @ key.transpose(-2, -1)) / math.sqrt(query.shape[-1])).softmax(-1) @ value
