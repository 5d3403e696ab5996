"""What training uses: the optimizer Lion, a smoothed loss, a metric, transforms of the model, and a callback."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launcher.data.dataloader import IGNORE_INDEX
from launcher.training.callbacks import Callback

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.engines.base import Engine, StepResult
    from launcher.engines.context import Context
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
    """Return the optimizer of these groups of named parameters; the embedding gets groups of its own."""
    split = []
    for group in groups:
        for is_embedding in (False, True):
            params = [pair for pair in group["params"] if ("embedding" in pair[0]) == is_embedding]
            if params:
                scale = options.embedding_lr_scale if is_embedding else 1.0
                split.append({**group, "params": params, "lr_scale": scale})
    return LionOptimizer(split, lr=options.lr, betas=options.betas)


def smoothed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy with a tenth of each label spread over the vocabulary, summed over the labelled tokens."""
    flat, targets = logits.flatten(0, -2).float(), labels.flatten()
    return torch.nn.functional.cross_entropy(
        flat, targets, ignore_index=IGNORE_INDEX, label_smoothing=0.1, reduction="sum"
    )


def accuracy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many labelled tokens are the most likely ones, and how many there are."""
    counted = labels != IGNORE_INDEX
    return ((logits.argmax(-1) == labels) & counted).sum(), counted.sum()


def use_rms_norm(model: PreTrainedModel) -> None:
    """Replace each layer norm by a root-mean-square norm."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.RMSNorm(child.normalized_shape, eps=child.eps))


def freeze_embedding(model: PreTrainedModel) -> None:
    """Train everything but the embedding, and what is tied to it."""
    model.get_input_embeddings().requires_grad_(False)


class WeightNorm(Callback):
    """Records the norm of the first trained parameter and its change, and counts evaluations of the whole run."""

    def __init__(self, context: Context, engine: Engine) -> None:
        super().__init__(context, engine)
        self._first_step, self._norm_before, self._evaluations = 0, 0.0, 0

    def on_start(self, step: int) -> None:
        """Remember where this process starts."""
        self._first_step = step

    def before_step(self, step: int) -> None:
        """Remember the norm."""
        self._norm_before = self._norm()

    def on_step(self, step: int, result: StepResult) -> Mapping[str, float]:
        """Return the norm, and its change."""
        norm = self._norm()
        return {"weight_norm": norm, "weight_norm_change": norm - self._norm_before}

    def on_evaluate(self, step: int, loss: float) -> Mapping[str, float]:
        """Return how many evaluations there were, those before a resume included."""
        self._evaluations += 1
        return {"evaluations": float(self._evaluations)}

    def on_save(self, step: int, folder: Path) -> Mapping[str, float]:
        """Return how many files the checkpoint has."""
        return {"files": float(sum(1 for file in folder.rglob("*") if file.is_file()))}

    def on_end(self, step: int) -> Mapping[str, float]:
        """Return the steps of this process."""
        return {"steps_here": float(step - self._first_step)}

    def on_exception(self, error: Exception) -> None:
        """Print what ends the run."""
        print(f"weight_norm: after {self._evaluations} evaluations: {type(error).__name__}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of evaluations."""
        return {"evaluations": self._evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting."""
        self._evaluations = state["evaluations"]

    def _norm(self) -> float:
        first = next(parameter for parameter in self.engine.module.parameters() if parameter.requires_grad)
        whole = first.full_tensor() if isinstance(first, DTensor) else first  # FSDP: all ranks take part
        return float(torch.linalg.vector_norm(whole.detach().float()))
