"""The encoder of the activation benchmark, as its processes run it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from launcher.benchmarks.instruments import PeakMemory, tensor_bytes, tensors_digest


class Encoder(nn.Module):  # type: ignore[misc]
    """torch's encoder layers one after the other, every so many of them recomputed in the backward pass.

    Args:
        every: recompute layers 0, every, 2 x every, …; 0 keeps all activations.
    """

    def __init__(self, *, layers: int, width: int, heads: int, feedforward: int, every: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, feedforward, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self._every = every

    def forward(self, hidden: Tensor, progress: Callable[[], None]) -> Tensor:
        """Return what the last layer makes of ``hidden`` (sequences, tokens, width); the same shape."""
        for number, layer in enumerate(self.layers):
            if self._every and number % self._every == 0:
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
            hidden.register_hook(lambda _: progress())
            progress()
        return hidden


def encoder_step(
    *,
    layers: int,
    width: int,
    heads: int,
    feedforward: int,
    batch: int,
    sequence: int,
    every: int,
    warmup: int,
    seed: int,
    rank: int,
    keep: str,
    progress: Callable[[], None],
) -> dict[str, Any]:
    """Take one forward and backward pass and return its peak memory, its seconds and digests of what went in and out.

    Args:
        layers: as ``width``, ``heads``, ``feedforward``, ``batch`` and ``sequence``: sizes.
        every: see :class:`Encoder`.
        warmup: whole passes before the one that is measured, and after one on a single sequence.
        seed: of weights, inputs and the gradient that comes in at the output.
        rank: number of the GPU to compute on, where there is one.
        keep: file that gets the gradients.
        progress: called from time to time.
    """
    from safetensors.torch import save_file

    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(seed)
    model = Encoder(layers=layers, width=width, heads=heads, feedforward=feedforward, every=every).to(device)
    inputs, incoming = (torch.randn(batch, sequence, width).to(device) for _ in range(2))
    incoming /= batch * sequence
    weights = tensors_digest(parameter for _, parameter in sorted(model.named_parameters()))
    for count in (1, *[batch] * warmup):  # one sequence first: what is loaded at first use is not part of the step
        model(inputs[:count], progress).backward(incoming[:count])
        model.zero_grad()
    peak = PeakMemory(device)
    started = time.perf_counter()
    model(inputs, progress).backward(incoming)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    above, before = peak.above_before(), peak.before
    gradients = {name: tensor_bytes(parameter.grad) for name, parameter in sorted(model.named_parameters())}
    save_file(gradients, keep)
    return {
        "peak_bytes": above,
        "before_bytes": before,
        "step_s": seconds,
        "weights": weights,
        "inputs": tensors_digest((inputs, incoming)),
        "gradients": tensors_digest(gradients.values()),
    }


def compare_gradients(*, one: str, other: str, progress: Callable[[], None]) -> dict[str, Any]:
    """Return how the tensors of two files differ, looking at one tensor of each at a time."""
    from safetensors import safe_open

    equal, largest = 0, 0.0
    with safe_open(one, framework="pt") as first, safe_open(other, framework="pt") as second:
        names = sorted(first.keys())
        assert names == sorted(second.keys()), "both files hold the gradients of the same encoder"
        for name in names:
            before, after = first.get_tensor(name), second.get_tensor(name)
            equal += torch.equal(before.view(torch.int32), after.view(torch.int32))
            largest = max(largest, (before.double() - after.double()).abs().max().item())
            progress()
    return {"tensors": len(names), "equal_tensors": equal, "largest_difference": largest}
