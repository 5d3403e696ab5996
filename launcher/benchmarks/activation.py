"""The encoder of the activation benchmark, as its processes run it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from launcher.benchmarks.harness import sample_interleaved
from launcher.benchmarks.instruments import PeakMemory, tensor_bytes, tensors_digest
from launcher.benchmarks.isolated import run_isolated
from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults, collect_case
from launcher.config.benchmark.memory import NO_CHECKPOINTING, ActivationBenchmark
from launcher.engines.context import Context

_ENCODER_STEP, _COMPARE_GRADIENTS = (
    "launcher.benchmarks.activation:encoder_step",
    "launcher.benchmarks.activation:compare_gradients",
)


def run_activation_benchmark(benchmark: ActivationBenchmark, context: Context) -> BenchmarkResults:
    """Measure every policy in turn; compare its gradients with those of no checkpointing."""
    with tempfile.TemporaryDirectory(dir=context.run_dir.path, prefix="gradients-") as folder:
        files = {name: str(Path(folder) / f"{name}.safetensors") for name in benchmark.policies}
        asked = {name: _arguments(benchmark, context, every, files[name]) for name, every in benchmark.policies.items()}
        samples = sample_interleaved(_ENCODER_STEP, asked, repeats=benchmark.repeats, context=context, exact_peaks=True)
        compared = {name: compare_files(files[NO_CHECKPOINTING], files[name], context) for name in benchmark.policies}
    cases = [collect_case(name, samples[name], ("peak_bytes", "step_s")) for name in benchmark.policies]
    return BenchmarkResults(
        benchmark=benchmark,
        cases=cases,
        facts={name: {**compared[name], **_sameness(samples[name])} for name in benchmark.policies},
        findings=tuple(_findings(benchmark, cases, compared, samples)),
        metrics=_metrics(cases, compared),
    )


def _arguments(benchmark: ActivationBenchmark, context: Context, every: int, gradients: str) -> dict[str, Any]:
    sizes = {key: value for key, value in asdict(benchmark).items() if key not in ("repeats", "every")}
    return {**sizes, "every": every, "seed": context.run.job.seed, "rank": context.local_rank, "keep": gradients}


def _findings(
    benchmark: ActivationBenchmark,
    cases: Sequence[BenchmarkCase],
    compared: Mapping[str, Any],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Iterator[str]:
    """Yield the article's figures for each policy that recomputes something."""
    plain = cases[0]
    yield f"peak without checkpointing: {_peak_gb(plain):.2f} GB above the level before the step"
    for case in cases[1:]:
        saved, added = _memory_saved(plain, case), _time_added(plain, case)
        found = compared[case.name]
        yield f"peak with checkpointing ({case.name}): {_peak_gb(case):.2f} GB"
        yield f"memory saved ({case.name}): {saved:.1%}"
        yield f"time added ({case.name}): {added:.1%}"
        equal = f"{found['equal_tensors']} of {found['tensors']} gradient tensors equal bit for bit"
        yield f"largest difference ({case.name}): {found['largest_difference']:.3e}, {equal}"
    starts = {(sample["weights"], sample["inputs"]) for taken in samples.values() for sample in taken}
    same = "the same in every process" if len(starts) == 1 else f"NOT the same: {len(starts)} different ones"
    yield f"weights and inputs: {same}"


def compare_files(plain: str, other: str, context: Context) -> dict[str, Any]:
    """Compare the gradients in two files.

    Returns the number of tensors, of those equal bit for bit, and the largest absolute difference.
    """
    return run_isolated(
        _COMPARE_GRADIENTS, {"one": plain, "other": other}, heartbeat=lambda: context.heartbeat.update("compare")
    )


def _sameness(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the digests of a case: one each where all its repeats computed the same."""
    return {key: sorted({sample[key] for sample in samples}) for key in ("weights", "inputs", "gradients")}


def _peak_gb(case: BenchmarkCase) -> float:
    return case.median("peak_bytes") / 1e9


def _memory_saved(plain: BenchmarkCase, case: BenchmarkCase) -> float:
    return 1 - case.median("peak_bytes") / plain.median("peak_bytes")


def _time_added(plain: BenchmarkCase, case: BenchmarkCase) -> float:
    """Return the median over rounds of the share of time added.

    Both sides of a round run next to each other, so a slow minute affects both.
    """
    pairs = zip(plain.samples["step_s"], case.samples["step_s"], strict=True)
    return statistics.median(after / before for before, after in pairs) - 1


def _metrics(cases: Sequence[BenchmarkCase], compared: Mapping[str, Any]) -> dict[str, float]:
    metrics = {}
    for case in cases[1:]:
        metrics[f"{case.name}/memory_saved"] = _memory_saved(cases[0], case)
        metrics[f"{case.name}/time_added"] = _time_added(cases[0], case)
        metrics[f"{case.name}/largest_difference"] = compared[case.name]["largest_difference"]
    return metrics


class Encoder(nn.Module):  # type: ignore[misc]
    """A chain of torch's encoder layers, some recomputed in the backward pass.

    Args:
        every: recompute layers 0, every, 2 x every, …; 0 keeps all activations.
    """

    def __init__(
        self, *, num_hidden_layers: int, hidden_size: int, num_attention_heads: int, intermediate_size: int, every: int
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden_size, num_attention_heads, intermediate_size, dropout=0.0, batch_first=True
            )
            for _ in range(num_hidden_layers)
        )
        self._every = every

    def forward(self, hidden: Tensor, progress: Callable[[], None]) -> Tensor:
        """Apply the layers to ``hidden`` (sequences, tokens, hidden size); same shape out."""
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
    num_hidden_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    intermediate_size: int,
    batch_size: int,
    sequence_length: int,
    every: int,
    warmup: int,
    seed: int,
    rank: int,
    keep: str,
    progress: Callable[[], None],
) -> dict[str, Any]:
    """Run one forward and backward pass; return peak memory, seconds and digests of its tensors.

    Digests cover the inputs and the outputs.

    Args:
        num_hidden_layers: as other sizes, in ``ActivationBenchmark``.
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
    model = Encoder(
        num_hidden_layers=num_hidden_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        every=every,
    ).to(device)
    inputs, incoming = (torch.randn(batch_size, sequence_length, hidden_size).to(device) for _ in range(2))
    incoming /= batch_size * sequence_length
    weights = tensors_digest(parameter for _, parameter in sorted(model.named_parameters()))
    for count in (1, *[batch_size] * warmup):  # one sequence first: what is loaded at first use is not part of the step
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
