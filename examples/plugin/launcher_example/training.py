"""What training uses: the optimizer Lion, a smoothed loss, and a callback."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from launcher.data.dataloader import IGNORE_INDEX
from launcher.training.callbacks import Callback

if TYPE_CHECKING:
    from launcher.engines.base import StepResult
    from launcher_example.options import Lion


class LionOptimizer(torch.optim.Optimizer):
    """The sign of a momentum, times the learning rate."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            share, kept = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum = state["exp_avg"]
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * momentum.lerp(parameter.grad, 1.0 - share).sign())
                momentum.lerp_(parameter.grad, 1.0 - kept)


def make_lion(options: Lion, groups: list[dict[str, Any]]) -> LionOptimizer:
    """Return the optimizer of these groups of parameters."""
    return LionOptimizer(groups, lr=options.lr, betas=options.betas)


def smoothed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy with a tenth of each label spread over the vocabulary, summed over the labelled tokens."""
    flat, targets = logits.flatten(0, -2).float(), labels.flatten()
    return torch.nn.functional.cross_entropy(
        flat, targets, ignore_index=IGNORE_INDEX, label_smoothing=0.1, reduction="sum"
    )


class WeightNorm(Callback):
    """Records the norm of the first parameter, and counts evaluations and checkpoints."""

    evaluations = saved = 0

    def on_step(self, step: int, result: StepResult) -> Mapping[str, float]:
        """Return the norm."""
        first = next(self.engine.module.parameters())
        return {"weight_norm": float(torch.linalg.vector_norm(first.detach().float()))}

    def on_evaluate(self, step: int, loss: float) -> Mapping[str, float]:
        """Return how many evaluations there were."""
        self.evaluations += 1
        return {"evaluations": float(self.evaluations)}

    def on_save(self, step: int, folder: Path) -> Mapping[str, float]:
        """Return how many files the checkpoint has."""
        return {"files": float(sum(1 for file in folder.rglob("*") if file.is_file()))}
