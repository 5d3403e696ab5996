"""One strategy on one rank: optimizer steps, generated tokens, comparison of final weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from launcher.data.dataloader import Loader
from launcher.data.dataset import open_run_splits
from launcher.engines.base import make_engine
from launcher.profiling.performance import StepClock

if TYPE_CHECKING:
    from launcher.config.job.verify import Verify
    from launcher.engines.base import Engine
    from launcher.engines.context import Context
    from launcher.verification.forked_ranks import CaseAnswer

_PROMPT = 4
"""Tokens that generation starts from."""


def run_case(job: Verify, context: Context, reference: Path, *, writes: bool) -> CaseAnswer:
    """Run the steps of ``context.run``; return losses, gradient norms, tokens, weight errors.

    Args:
        job: of the user's run.
        context: of this rank in the case.
        reference: file with the final weights of one process.
        writes: write that file instead of comparing with it.
    """
    run = context.run
    lr = run.optimizer.lr * (1.0 if writes else 1.0 + job.perturb)
    splits = open_run_splits(run)
    loader = Loader(splits, context.batch, seed=job.seed, rank=context.data_rank)
    with make_engine(context, StepClock(context.heartbeat, cuda=torch.cuda.is_available())) as engine:
        results = [
            engine.step(loader.step(step), lr=lr * run.schedule.factor(step, job.steps)) for step in range(job.steps)
        ]
        answer: CaseAnswer = {
            "losses": [result.loss for result in results],
            "grad_norms": [result.grad_norm for result in results],
            "generated": engine.generate(_prompt(splits.vocab_size), max_new_tokens=job.generated_tokens).tolist(),
        }
        if writes:
            _write(engine, reference)
        else:
            answer["weights"] = _compare(engine, reference, counts=_is_first_of_its_stage(context))
    return answer


def _prompt(vocab_size: int) -> torch.Tensor:
    return (torch.arange(_PROMPT) % vocab_size).unsqueeze(0)


def _is_first_of_its_stage(context: Context) -> bool:
    """Return whether this rank reports for its stage.

    All ranks that share the stage have the same weights.
    """
    kinds = [field.name for field in dataclasses.fields(context.dims) if field.name != "pipeline"]
    return all(context.dims.coordinate(context.rank, kind) == 0 for kind in kinds)


def _write(engine: Engine, reference: Path) -> None:
    """Write the weights, and under which other names the model knows some of them."""
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            ties[name] = known
    save_file({name: tensor.contiguous() for name, tensor in engine.weights()}, reference, metadata=ties)


def _compare(engine: Engine, reference: Path, *, counts: bool) -> dict[str, Any]:
    """Return squared norms of the stage's weights and of their differences, tensor by tensor."""
    apart: dict[str, tuple[float, float]] = {}
    unknown = []
    with safe_open(reference, framework="pt") as file:
        ties, names = file.metadata() or {}, set(file.keys())
        for called, tensor in engine.weights():  # all ranks, whole tensors take all of them
            name = ties.get(called, called)
            if not counts:
                continue
            if name not in names or tuple(file.get_slice(name).get_shape()) != tuple(tensor.shape):
                unknown.append(called)
                continue
            expected = file.get_tensor(name).double()
            apart[name] = (_square(tensor.double() - expected), _square(expected))
    return {"apart": apart, "unknown": unknown, "all": sorted(names)}


def _square(tensor: torch.Tensor) -> float:
    value = float(tensor.square().sum())
    return value if math.isfinite(value) else math.inf
