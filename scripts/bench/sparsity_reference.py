"""Compare a run of job=sparsify with Wanda and SparseGPT computed anew in float64, by the papers' formulas.

    python scripts/bench/sparsity_reference.py RUN_DIRECTORY

The original model is loaded again and pruned by the code below on the run's calibration text. It shares none with the
launcher's: SparseGPT factors the Hessian itself instead of its inverse, and updates all weights at each input. Both
perplexities are of the run's held-out text.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import print_machine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from launcher.benchmarks.sparsify import calibration_batches
from launcher.config.activation import NoCheckpointing
from launcher.config.job.sparsify import Sparsify
from launcher.config.snapshot import load_run
from launcher.config.sparsity import CalibratedPruning, Pruning, SparseGpt
from launcher.data.dataset import open_splits
from launcher.models.build import build_model
from launcher.utils.files import read_json

MOST = 0.02
"""Largest relative difference of the perplexities."""


class _Reached(Exception):
    """The block whose arguments or inputs are wanted has been called."""


def layers_of(block: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a block."""
    return {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear | Conv1D)}


@dataclass
class Call:
    """Arguments of a block in one forward pass."""

    hidden: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]

    def run(self, block: nn.Module) -> Tensor:
        """Return the block's hidden states."""
        found = block(self.hidden, *self.rest, **self.named)
        return found[0] if isinstance(found, tuple) else found


def call_of(model: Any, block: nn.Module, batch: Any) -> Call:
    """Return how a block is called, by running the model from its start."""
    found: list[Call] = []

    def take(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(Call(args[0], args[1:], named))
        raise _Reached

    hook = block.register_forward_pre_hook(take, with_kwargs=True)
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    with contextlib.suppress(_Reached):
        model(input_ids=batch.input_ids, use_cache=False, **positions)
    hook.remove()
    return found[0]


def inputs_of(block: nn.Module, calls: Sequence[Call]) -> dict[str, Tensor]:
    """Return all inputs of a block's layers, (tokens, inputs) in float64."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers_of(block)}

    def take(name: str) -> Callable[..., None]:
        return lambda _, args: found[name].append(args[0].flatten(0, 1))

    hooks = [layer.register_forward_pre_hook(take(name)) for name, layer in layers_of(block).items()]
    for call in calls:
        call.run(block)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def zero_in_groups(scores: Tensor, *, kept: int, size: int) -> Tensor:
    """Return True for all but the ``kept`` largest scores of each group of ``size`` inputs of an output."""
    ranks = scores.view(len(scores), -1, size).argsort(dim=-1, descending=True).argsort(dim=-1)
    return (ranks >= kept).view_as(scores)


def zero_in_rows(scores: Tensor, ratio: float) -> Tensor:
    """Return True for the smallest scores of each row."""
    ranks = scores.argsort(dim=-1).argsort(dim=-1)
    return ranks < math.floor(scores.shape[-1] * ratio + 1e-6)


def zeros_of(scores: Tensor, method: Pruning, *, by_row: bool) -> Tensor:
    """Return where zeros go: in groups, in each row, or in the matrix as a whole."""
    if method.pattern != "unstructured":
        kept, size = map(int, method.pattern.split(":"))
        return zero_in_groups(scores, kept=kept, size=size)
    ratio = 0.5 if method.ratio is None else method.ratio
    return zero_in_rows(scores, ratio) if by_row else zero_in_rows(scores.reshape(1, -1), ratio).view_as(scores)


def wanda(weight: Tensor, inputs: Tensor, method: Pruning) -> Tensor:
    """Return the matrix pruned by ``|weight| * norm of its input``, each output by itself."""
    scores = weight.abs() * inputs.square().sum(dim=0).sqrt()
    return weight.masked_fill(zeros_of(scores, method, by_row=True), 0.0)


def inverse_rows(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first element and, as row j, the first row of the inverse Hessian of input j and all after it.

    With ``H = U D U^T``, U being upper triangular with ones on its diagonal, that row is row j of the inverse of U,
    divided by the j-th element of D.
    """
    scaled = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)  # U times the square root of D
    root = scaled.diagonal()
    unit = torch.eye(len(hessian), dtype=hessian.dtype)
    return 1 / root.square(), torch.linalg.solve_triangular(scaled, unit, upper=True) / root[:, None]


def sparsegpt(weight: Tensor, inputs: Tensor, method: SparseGpt) -> Tensor:
    """Return the matrix pruned by optimal brain surgery in the order of its inputs, updating all weights at once."""
    hessian = 2 * inputs.t() @ inputs
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    diagonal += method.damping * diagonal.mean()
    first, rows = inverse_rows(hessian)
    weight = weight.masked_fill(dead, 0.0).t().contiguous()
    zeros = torch.zeros_like(weight, dtype=torch.bool)
    size = 1 if method.pattern == "unstructured" else int(method.pattern.partition(":")[2])
    step = method.block_size if size == 1 else size
    for at in range(len(weight)):
        if at % step == 0:
            part = slice(at, at + step)
            zeros[part] = zeros_of(weight[part].t().square() / first[part], method, by_row=False).t()
        error = torch.where(zeros[at], weight[at], 0.0) / first[at]
        weight[at:] -= torch.outer(rows[at, at:], error)
        weight[at, zeros[at]] = 0.0
    return weight.t()


def prune(
    model: Any, blocks: Sequence[nn.Module], batches: Sequence[Any], method: Pruning, *, from_start: bool = True
) -> Iterator[int]:
    """Prune a float64 model in place; yield the number of each block that is done.

    Args:
        model: whose blocks they are.
        blocks: in order.
        batches: calibration text.
        method: of pruning.
        from_start: run the whole model again for each block; else the arguments of the first block besides hidden
            states are those of all others, as in the reference implementations.
    """
    calls = [call_of(model, blocks[0], batch) for batch in batches]
    for number, block in enumerate(blocks):
        if from_start:
            calls = [call_of(model, block, batch) for batch in batches]
        layers = layers_of(block)
        inputs = inputs_of(block, calls) if isinstance(method, CalibratedPruning) else dict.fromkeys(layers)
        for name, layer in layers.items():
            weight = layer.weight.t().clone() if isinstance(layer, Conv1D) else layer.weight.clone()
            if isinstance(method, SparseGpt):
                made = sparsegpt(weight, inputs[name], method)
            elif isinstance(method, CalibratedPruning):
                made = wanda(weight, inputs[name], method)
            else:
                made = weight.masked_fill(zeros_of(weight.abs(), method, by_row=False), 0.0)
            layer.weight.copy_(made.t() if isinstance(layer, Conv1D) else made)
        if not from_start:
            calls = [replace(call, hidden=call.run(block)) for call in calls]
        yield number


def perplexity(model: Any, rows: Sequence[Any]) -> float:
    """Return the perplexity of held-out rows, in float64."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.from_numpy(row.input_ids)[None], torch.from_numpy(row.labels)
        where = {} if row.position_ids is None else {"position_ids": torch.from_numpy(row.position_ids)[None]}
        logits = model(input_ids=ids, use_cache=False, **where).logits[0]
        total += float(cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return math.exp(total / count)


def compare(run_dir: Path) -> dict[str, float]:
    """Return both perplexities of a finished run."""
    run = load_run(run_dir / "run.yaml")
    job, method = run.job, run.sparsity
    assert isinstance(job, Sparsify), f"{run_dir} is not a run of job=sparsify"
    assert isinstance(method, Pruning), "which needs a method"
    if method.skip or (isinstance(method, CalibratedPruning) and method.allocation != "uniform"):
        sys.exit("sparsity.skip and sparsity.allocation are not computed here: compare a run without them")
    splits = open_splits(run.data, run.model, sequence_length=job.sequence_length, seed=job.seed)
    batches = calibration_batches(method, job, splits) if isinstance(method, CalibratedPruning) else []
    model = build_model(run.model, seed=job.seed, attention=run.attention, activation=NoCheckpointing())
    model.eval().requires_grad_(False).double()  # built in fp32: random weights of float64 would be others
    parts = max((each for each in model.base_model.children() if isinstance(each, nn.ModuleList)), key=len)
    started = time.monotonic()
    for number in prune(model, list(parts), batches, method, from_start=False):
        print(f"block {number + 1} of {len(parts)}: {time.monotonic() - started:.0f} s", flush=True)
    held_out = [splits.held_out.row(at) for at in range(min(job.eval_sequences, splits.held_out.num_sequences))]
    found: Mapping[str, Any] = read_json(run_dir / "sparsify.json")
    return {"float64": perplexity(model, held_out), "launcher": found["fidelity"]["perplexity_after"]}


def main() -> int:
    """Print both; exit with 1 if they differ by more than ``MOST``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a finished run of job=sparsify")
    folder = parser.parse_args().run
    with torch.no_grad():
        found = compare(folder)
    print_machine()
    apart = found["launcher"] / found["float64"] - 1
    print(f"perplexity: launcher {found['launcher']:.4f}, float64 {found['float64']:.4f}, apart {apart:+.3%}")
    return int(abs(apart) > MOST)


if __name__ == "__main__":
    sys.exit(main())
