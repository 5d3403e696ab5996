"""Optimizers that look at whole matrices, also sharded ones: Muon and Adafactor.

A step of these depends on all values of a matrix. Of a sharded one each rank gathers the whole, one at a time, computes
the same step as one process would, and keeps its share of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz  # the class takes plain tensors only

from launcher.checkpoint.regions import Box, slices
from launcher.engines.model_state import local_shard
from launcher.engines.optimizer import unnamed
from launcher.engines.state import region_of

if TYPE_CHECKING:
    from launcher.config.optimizer import Adafactor, Muon

HIDDEN = "is_hidden"
"""Key of groups: whether they hold matrices of the model's blocks."""
_NS_COEFFICIENTS, _NS_EPS = (3.4445, -4.7750, 2.0315), 1e-7  # of torch.optim.Muon


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered where it is sharded; every rank calls it."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # an offloaded shard is in RAM


def share_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank has of a parameter."""
    region = region_of(parameter)
    assert isinstance(region, Box), "parameters are divided into boxes"
    return whole[slices(region)].to(local_shard(parameter).device)


class ShardedMuon(torch.optim.Optimizer):  # type: ignore[misc]
    """Muon on the matrices of blocks, AdamW on all else.

    Args:
        groups: of parameters; :data:`HIDDEN` tells which get Muon.
        options: of the run.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], options: Muon) -> None:
        self._options = options
        super().__init__(groups, {"lr": options.lr, "weight_decay": options.weight_decay})
        others = [group for group in self.param_groups if not group[HIDDEN]]
        self._adamw = None
        if others:
            copies = [{**group, "params": list(group["params"])} for group in others]
            self._adamw = torch.optim.AdamW(copies, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
            for group, complete in zip(others, self._adamw.param_groups, strict=True):
                group.update(complete)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "engines compute gradients once"
        if self._adamw is not None:
            self._adamw.state = self.state
            self._adamw.param_groups = [group for group in self.param_groups if not group[HIDDEN]]
            self._adamw.step()
        for group in self.param_groups:
            if group[HIDDEN]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, lr=group["lr"], weight_decay=group["weight_decay"])

    def _update(self, parameter: nn.Parameter, *, lr: float, weight_decay: float) -> None:
        gradient = parameter.grad
        assert gradient is not None
        momentum, average = self._options.momentum, self.saved_state(parameter)["momentum_buffer"]
        average.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum) if self._options.nesterov else average
        orthogonal = _zeropower_via_newtonschulz(
            whole_tensor(update), _NS_COEFFICIENTS, self._options.ns_steps, _NS_EPS
        )
        rate = _adjust_lr(lr, self._options.adjust_lr, parameter.shape)
        local = local_shard(parameter.detach())
        local.mul_(1 - lr * weight_decay)
        local.add_(share_of(orthogonal, parameter), alpha=-rate)

    def saved_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the state of a parameter by name, created if missing."""
        state = self.state[parameter]
        if not state:
            if any(parameter is each for group in self.param_groups if group[HIDDEN] for each in group["params"]):
                state["momentum_buffer"] = torch.zeros_like(parameter)
            else:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return dict(state)


class ShardedAdafactor(torch.optim.Optimizer):  # type: ignore[misc]
    """torch's Adafactor, on one whole parameter at a time where they are sharded.

    Args:
        groups: of parameters.
        options: of the run.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], options: Adafactor) -> None:
        numbers: dict[str, Any] = {"beta2_decay": options.beta2_decay, "d": options.clip_threshold}
        numbers |= {"lr": options.lr, "eps": (None, options.min_scale)}
        self._inner = torch.optim.Adafactor([torch.zeros(1)], **numbers, foreach=False)
        super().__init__(groups, {**self._inner.defaults, "weight_decay": options.weight_decay})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "engines compute gradients once"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        whole = whole_tensor(parameter.detach())
        whole.grad = whole_tensor(parameter.grad)
        self._inner.param_groups = [{**group, "params": [whole]}]
        self._inner.state = {whole: self.saved_state(parameter)}
        self._inner.step()
        whole.grad = None
        if isinstance(parameter, DTensor):
            local_shard(parameter.detach()).copy_(share_of(whole, parameter))

    def saved_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the state of a parameter by name, whole on every rank, created if missing."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            place = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else parameter.device
            shapes = {"step": (), "variance": parameter.shape}
            if parameter.ndim > 1:
                rows, columns = (*parameter.shape[:-1], 1), (*parameter.shape[:-2], 1, parameter.shape[-1])
                shapes = {"step": (), "row_var": rows, "col_var": columns}
            for name, shape in shapes.items():
                state[name] = torch.zeros(shape, dtype=torch.float32, device=place)
        return state


def make_muon(options: Muon, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return Muon for matrices in blocks, with AdamW for the others."""
    return ShardedMuon(unnamed(groups), options)


def make_adafactor(options: Adafactor, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return torch's Adafactor."""
    return ShardedAdafactor(unnamed(groups), options)
