"""Self-attention by every kernel with the same weights: measured, and a reference in fp64."""

from __future__ import annotations

import functools
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from launcher.benchmarks.instruments import PeakMemory, tensors_digest
from launcher.engines.distributed import DTYPES
from launcher.utils.build_cache import quote_torch_library_path

KernelFunction = Callable[[nn.MultiheadAttention, Tensor], Tensor]
"""From hidden states (sequences, tokens, width) to the layer's output, of the same shape."""
_MAY_LACK = ("sdpa_flash", "flex")
"""Kernels that are not for every device, number format and direction."""
_SMALL = 128
"""Tokens of the first, small pass, which loads code outside of the measured step."""
_ENOUGH_S, _ENOUGH_STEPS = 0.5, 20
"""Steps are repeated until they took so long together, or are so many."""


def probe_kernels(
    *, kernels: Sequence[str], passes: Sequence[str], progress: Callable[[], None], **sizes: Any
) -> dict[str, Any]:
    """Return the free memory, and by ``kernel/pass`` the reason a kernel cannot run here.

    Args:
        kernels: to look at.
        passes: ``forward``, ``backward``.
        progress: called from time to time.
        sizes: as ``make_layer`` takes them, but for ``sequence_length``.
    """
    layer, inputs, incoming = make_layer(sequence_length=_SMALL, **{**sizes, "batch_size": 1})
    lacking = {}
    for kernel in (kernel for kernel in _MAY_LACK if kernel in kernels):
        for name in passes:
            progress()
            why = _missing_support(kernel, layer, inputs, incoming if name == "backward" else None)
            if why is not None:
                lacking[f"{kernel}/{name}"] = why
    return {"free_bytes": _free_bytes(inputs.device), "lacking": lacking}


def _missing_support(kernel: str, layer: nn.MultiheadAttention, inputs: Tensor, incoming: Tensor | None) -> str | None:
    """Return torch's reason why it does not support this computation.

    Any other error is a bug of ours and ends the process.
    """
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported

    try:
        run_kernel(kernel, layer, inputs, incoming)
    except (NotImplementedError, BackendCompilerFailed, Unsupported) as error:
        return _one_line(error)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    """Return torch's message in one line.

    torch's compiler puts the reason of a failed compilation far below its own first line.
    """
    text = str(error).strip()
    inner = re.search(r"NotImplementedError\((['\"])(.+?)\1\)", text)
    return inner[2] if inner else text.splitlines()[0]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    from launcher.utils.hardware import memory_limit

    return min(memory_limit(), int(psutil.virtual_memory().available))


def measure_kernel(
    *, kernel: str, backward: bool, warmup: int, reference: str, progress: Callable[[], None], **sizes: Any
) -> dict[str, Any]:
    """Measure one kernel at one length: peak memory, time, and error against the reference.

    Args:
        kernel: name in ``KERNEL_FUNCTIONS``.
        backward: whether gradients are computed too.
        warmup: whole passes before the one that is measured, and after one on a single short sequence.
        reference: file that ``write_reference`` wrote.
        progress: called from time to time.
        sizes: as ``make_layer`` takes them.
    """
    layer, inputs, incoming = make_layer(**sizes)
    step = _KernelStep(kernel, layer, inputs, incoming if backward else None)
    if kernel != "flex":  # compiled again for every length
        step(count=1, tokens=_SMALL)
        progress()
    for _ in range(max(warmup, kernel == "flex")):
        step()
        progress()
    step.clear_gradients()
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
        "weights": tensors_digest(layer.parameters()),
        "inputs": tensors_digest((inputs, incoming)),
    }


class _KernelStep:
    """One pass of a kernel; it keeps what the last one found."""

    def __init__(self, kernel: str, layer: nn.MultiheadAttention, inputs: Tensor, incoming: Tensor | None) -> None:
        self._kernel, self._layer, self._inputs, self._incoming = kernel, layer, inputs, incoming
        self.found: tuple[Tensor, Tensor | None] | None = None

    def clear_gradients(self) -> None:
        """Release the results of the last step, so that they do not count in the memory of the next."""
        self.found = None

    def __call__(self, count: int | None = None, tokens: int | None = None) -> float:
        """Run the pass, on the first sequences and tokens if asked, and return its seconds."""
        inputs, incoming = (
            None if tensor is None else tensor[:count, :tokens].contiguous()
            for tensor in (self._inputs, self._incoming)
        )
        assert inputs is not None, "there always is an input"
        self.clear_gradients()
        self._layer.zero_grad(set_to_none=False)
        _synchronise(self._inputs.device)
        started = time.perf_counter()
        self.found = run_kernel(self._kernel, self._layer, inputs, incoming)
        _synchronise(self._inputs.device)
        return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _errors(reference: str, **found: Tensor | None) -> dict[str, float]:
    """Return each tensor's largest absolute error, and its share of the largest reference value."""
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


def make_layer(
    *,
    batch_size: int,
    sequence_length: int,
    hidden_size: int,
    num_attention_heads: int,
    precision: str,
    seed: int,
    rank: int,
) -> tuple[nn.MultiheadAttention, Tensor, Tensor]:
    """Return the layer, its input and the gradient of its output.

    They hold the same numbers in every process.
    """
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(hidden_size, num_attention_heads, batch_first=True)
    for bias in (layer.in_proj_bias, layer.out_proj.bias):
        nn.init.uniform_(bias, -0.1, 0.1)  # zeros would hide one that is left out
    inputs, incoming = (torch.randn(batch_size, sequence_length, hidden_size) for _ in range(2))
    to = {"device": device, "dtype": DTYPES[precision]}
    return layer.to(**to), inputs.to(**to), incoming.to(**to)


def split_heads(layer: nn.MultiheadAttention, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split a projection into queries, keys and values, as views.

    Each has the shape (sequences, heads, tokens, head width).
    """
    together = functional.linear(hidden, layer.in_proj_weight, layer.in_proj_bias)
    query, key, value = together.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return query, key, value


def merge_heads(values: Tensor) -> Tensor:
    """Return (sequences, heads, tokens, head width) as (sequences, tokens, width)."""
    return values.transpose(1, 2).flatten(2)


def _torch_mha(layer: nn.MultiheadAttention, hidden: Tensor, *, need_weights: bool, training: bool) -> Tensor:
    layer.train(training)  # there is no dropout: this only decides which code torch takes
    output: Tensor = layer(hidden, hidden, hidden, need_weights=need_weights)[0]
    return output


def _between_projections(kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> KernelFunction:
    def attend(layer: nn.MultiheadAttention, hidden: Tensor) -> Tensor:
        output: Tensor = layer.out_proj(merge_heads(kernel(*split_heads(layer, hidden))))
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

    quote_torch_library_path()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    output: Tensor = _compiled_flex()(query, key, value)
    return output


KERNEL_FUNCTIONS: dict[str, KernelFunction] = {
    "mha_weights": functools.partial(_torch_mha, need_weights=True, training=True),
    "mha": functools.partial(_torch_mha, need_weights=False, training=True),
    "mha_eval": functools.partial(_torch_mha, need_weights=False, training=False),
    "eager": _between_projections(_eager),
    "sdpa_math": _between_projections(functools.partial(_sdpa, backend=SDPBackend.MATH)),
    "sdpa_flash": _between_projections(functools.partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION)),
    "flex": _between_projections(_flex),
}
"""By name of the kernel."""


def run_kernel(
    kernel: str, layer: nn.MultiheadAttention, inputs: Tensor, incoming: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Compute the output and, if a gradient is given, those of the input and the weights.

    Gradients of weights are added to what is there: cleared, but not given back, they are no part of a peak.
    """
    if incoming is None:
        with torch.no_grad():
            return KERNEL_FUNCTIONS[kernel](layer, inputs), None
    leaf = inputs.detach().requires_grad_()
    output = KERNEL_FUNCTIONS[kernel](layer, leaf)
    output.backward(incoming)
    return output.detach(), leaf.grad


_SCORES_AT_ONCE = 2**24
"""128 MiB of fp64."""


def write_reference(
    *, keep: Mapping[str, str], backward: bool, progress: Callable[[], None], **sizes: Any
) -> dict[str, Any]:
    """Write the fp64 reference: the output and the gradient of the input, into files.

    It is computed from the same numbers that the kernels start from.

    Args:
        keep: file by tokens of a sequence, whose number is text as JSON has it.
        backward: whether there is a gradient.
        progress: called from time to time.
        sizes: as ``launcher.benchmarks.attention_kernels.make_layer`` takes them, but for ``sequence_length``.
    """
    from safetensors.torch import save_file

    for tokens, file in keep.items():
        layer, inputs, incoming = make_layer(sequence_length=int(tokens), **sizes)
        layer, inputs = layer.double().requires_grad_(False), inputs.double().requires_grad_(backward)
        output = layer.out_proj(merge_heads(_exact_attention(*split_heads(layer, inputs), progress)))
        found = {"output": output.detach().cpu()}
        if backward:
            output.backward(incoming.double())
            assert inputs.grad is not None, "the output depends on the input"
            found["gradient"] = inputs.grad.cpu()
        save_file(found, file)
    return {}


def _exact_attention(query: Tensor, key: Tensor, value: Tensor, progress: Callable[[], None]) -> Tensor:
    """Return softmax(QK^T / sqrt(d))V for (sequences, heads, tokens, head width)."""
    _, heads, tokens, _ = query.shape
    rows = max(1, _SCORES_AT_ONCE // (heads * tokens))
    items = []
    for number in range(len(query)):
        one = slice(number, number + 1)
        blocks = [
            checkpoint(_exact_block, part, key[one], value[one], progress, use_reentrant=False)
            for part in query[one].split(rows, dim=2)
        ]
        items.append(torch.cat(blocks, dim=2))
    return torch.cat(items)


def _exact_block(query: Tensor, key: Tensor, value: Tensor, progress: Callable[[], None]) -> Tensor:
    progress()
    return ((query @ key.transpose(-2, -1)) / math.sqrt(query.shape[-1])).softmax(-1) @ value
