"""The processes of the benchmark of attention: what a kernel lacks here, and one kernel at one length."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from launcher.benchmarks.attending.layer import start, take
from launcher.benchmarks.encoder import digest
from launcher.benchmarks.peak import PeakMemory

_MAY_LACK = ("sdpa_flash", "flex")
"""Kernels that are not for every device, number format and direction."""
_SMALL = 128
"""Tokens of the first, small pass: what is loaded at first use is no part of a step."""
_ENOUGH_S, _ENOUGH_STEPS = 0.5, 20
"""Steps are repeated until they took so long together, or are so many."""


def probe(
    *, kernels: Sequence[str], passes: Sequence[str], progress: Callable[[], None], **sizes: Any
) -> dict[str, Any]:
    """Return how much memory is free, and why kernels cannot do some pass here, by ``kernel/pass``.

    Args:
        kernels: to look at.
        passes: ``forward``, ``backward``.
        progress: called from time to time.
        sizes: as ``launcher.benchmarks.attending.layer.start`` takes them, but for the sequence.
    """
    layer, inputs, incoming = start(sequence=_SMALL, **{**sizes, "batch": 1})
    lacking = {}
    for kernel in (kernel for kernel in _MAY_LACK if kernel in kernels):
        for name in passes:
            progress()
            why = _lack(kernel, layer, inputs, incoming if name == "backward" else None)
            if why is not None:
                lacking[f"{kernel}/{name}"] = why
    return {"free_bytes": _free_bytes(inputs.device), "lacking": lacking}


def _lack(kernel: str, layer: nn.MultiheadAttention, inputs: Tensor, incoming: Tensor | None) -> str | None:
    """Return torch's reason for not computing this at all; any other error is one of ours, and ends the process."""
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported

    try:
        take(kernel, layer, inputs, incoming)
    except (NotImplementedError, BackendCompilerFailed, Unsupported) as error:
        return _in_a_line(error)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        return _in_a_line(error)
    return None


def _in_a_line(error: Exception) -> str:
    """Return what torch says; its compiler puts the reason of what it compiles far below its own first line."""
    text = str(error).strip()
    inner = re.search(r"NotImplementedError\((['\"])(.+?)\1\)", text)
    return inner[2] if inner else text.splitlines()[0]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    from launcher.machine import memory_limit

    return min(memory_limit(), int(psutil.virtual_memory().available))


def measure(
    *, kernel: str, backward: bool, warmup: int, reference: str, progress: Callable[[], None], **sizes: Any
) -> dict[str, Any]:
    """Return peak memory and time of one kernel at one length, and how far its numbers are from the reference.

    Args:
        kernel: name in ``launcher.benchmarks.attending.layer.ATTEND``.
        backward: whether gradients are computed too.
        warmup: whole passes before the one that is measured, and after one on a single short sequence.
        reference: file that ``launcher.benchmarks.attending.exact.exact`` wrote.
        progress: called from time to time.
        sizes: as ``launcher.benchmarks.attending.layer.start`` takes them.
    """
    layer, inputs, incoming = start(**sizes)
    step = _Step(kernel, layer, inputs, incoming if backward else None)
    if kernel != "flex":  # compiled anew for every length
        step(count=1, tokens=_SMALL)
        progress()
    for _ in range(max(warmup, kernel == "flex")):
        step()
        progress()
    step.forget()
    peak = PeakMemory(inputs.device)
    seconds = [step()]
    above = peak.above_before()
    while sum(seconds) < _ENOUGH_S and len(seconds) < _ENOUGH_STEPS:
        seconds.append(step())
    assert step.found is not None, "a step was taken"
    return {
        "peak_bytes": above,
        "before_bytes": peak.before,
        "step_s": statistics.median(seconds),
        **_errors(reference, output=step.found[0], gradient=step.found[1]),
        "weights": digest(layer.parameters()),
        "inputs": digest((inputs, incoming)),
    }


class _Step:
    """One pass of a kernel; it keeps what the last one found."""

    def __init__(self, kernel: str, layer: nn.MultiheadAttention, inputs: Tensor, incoming: Tensor | None) -> None:
        self._kernel, self._layer, self._inputs, self._incoming = kernel, layer, inputs, incoming
        self.found: tuple[Tensor, Tensor | None] | None = None

    def forget(self) -> None:
        """Let go of what the last step found, so that it is no part of the next one's memory."""
        self.found = None

    def __call__(self, count: int | None = None, tokens: int | None = None) -> float:
        """Take it, on the first sequences and tokens where that is asked for, and return its seconds."""
        inputs, incoming = (
            None if tensor is None else tensor[:count, :tokens].contiguous()
            for tensor in (self._inputs, self._incoming)
        )
        assert inputs is not None, "there always is an input"
        self.forget()
        self._layer.zero_grad(set_to_none=False)
        _synchronise(self._inputs.device)
        started = time.perf_counter()
        self.found = take(self._kernel, self._layer, inputs, incoming)
        _synchronise(self._inputs.device)
        return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _errors(reference: str, **found: Tensor | None) -> dict[str, float]:
    """Return the largest absolute difference of each tensor, and its share of the reference's largest value."""
    from safetensors import safe_open

    errors = {}
    with safe_open(reference, framework="pt") as file:
        for name, tensor in found.items():
            if tensor is not None:
                expected = file.get_tensor(name)
                largest = (tensor.cpu().double() - expected).abs().max().item()
                errors[f"{name}_error"] = largest
                errors[f"{name}_relative"] = largest / expected.abs().max().item()
    return errors
