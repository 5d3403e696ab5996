"""One optimizer step from gradients: groups, global norm, clipping, loss scale, update."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from launcher.config.optimizer import Muon
from launcher.config.precision import Fp16Precision, Precision
from launcher.engines.base import StepResult
from launcher.engines.distributed import ranks_with_nonfinite, sum_over_ranks
from launcher.engines.kept_zeros import KeptZeros, linear_matrices
from launcher.engines.model_state import local_shard
from launcher.errors import ConfigError, JobError
from launcher.models.layers import blocks
from launcher.plugins.calls import named_in_errors
from launcher.plugins.loading import executor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from launcher.config.optimizer import AdamW, Optimizer, Sgd
    from launcher.config.run import Run


OPTIMIZERS: dict[str, str] = {
    "adamw": "launcher.engines.optimizer:make_adamw",
    "adamw_8bit": "launcher.engines.adamw_8bit:make_adamw_8bit",
    "adafactor": "launcher.engines.matrix_optimizers:make_adafactor",
    "muon": "launcher.engines.matrix_optimizers:make_muon",
    "sgd": "launcher.engines.optimizer:make_sgd",
}
"""Factory of each kind of optimizer: from its options and groups of named parameters."""


def make_adamw(options: AdamW, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return torch's fused AdamW."""
    return torch.optim.AdamW(unnamed(groups), lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


def make_sgd(options: Sgd, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return torch's SGD; its fused kernels know no shards."""
    momentum, nesterov = options.momentum, options.nesterov
    return torch.optim.SGD(unnamed(groups), lr=options.lr, momentum=momentum, nesterov=nesterov, foreach=True)


def unnamed(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups of parameters without their names."""
    return [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]


class OptimizerStep:
    """The optimizer of one rank, and everything between its gradients and its next weights.

    Master weights, gradients and moments are fp32. The norm is that of the whole model, whatever share of it this rank
    holds, so every rank clips alike.

    Args:
        models: what this rank trains; one, or several chunks of a pipeline.
        run: for optimizer, precision and clipping.
        device: where this rank computes.
        stages: the group of ranks that hold the other layers of this model, if there are any.
        counted_elsewhere: parameters of ``models`` that another stage holds too and counts in the norm.
        tied: further names of tied parameters, each with the name that the parameter has in the whole model.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        run: Run,
        *,
        device: torch.device,
        stages: ProcessGroup | None = None,
        counted_elsewhere: Sequence[nn.Parameter] = (),
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self._clip_norm, self._device, self._stages = run.batched_job.clip_norm, device, stages
        self.scale = LossScale(run.precision)
        names = {parameter: (tied or {}).get(name, name) for parameter, name in parameter_names(models).items()}
        groups = parameter_groups(names, run.optimizer, hidden=_hidden_matrices(models, run.optimizer))
        check_groups(run.optimizer, names, device=device)
        self._parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        skipped = set(map(id, counted_elsewhere))
        self._counted = [parameter for parameter in self._parameters if id(parameter) not in skipped]
        self.optimizer = make_optimizer(run.optimizer, groups, names=names)
        self._kept_zeros = KeptZeros(linear_matrices(models).values()) if run.sparsity.keep else None

    def apply(
        self,
        own_sum: Tensor,
        tokens: Tensor,
        *,
        lr: float,
        max_loss: float | None = None,
        preempted: bool,
        counted: int = 1,
    ) -> StepResult:
        """Clip and apply the gradient if it is finite and the loss below its limit.

        All numbers are fetched in one go.

        Args:
            own_sum: this rank's share of the loss, summed over its tokens, an fp64 scalar.
            tokens: number of tokens in the global batch, an int64 scalar.
            lr: learning rate.
            max_loss: limit of the loss; ``None`` without.
            preempted: whether this rank has been asked to leave.
            counted: how many ranks report the loss of one and the same token.
        """
        sums = torch.stack([own_sum, torch.full_like(own_sum, float(preempted))])
        if dist.is_initialized():
            dist.all_reduce(sums)
        if self._kept_zeros is not None:
            self._kept_zeros.mask_gradients()
        norm = self._norm()
        total, num_preempted, scaled_norm, num_tokens = torch.stack([*sums, norm, tokens.double()]).tolist()
        grad_norm, overflow = scaled_norm / self.scale.value, not math.isfinite(scaled_norm)
        loss = total / (num_tokens * counted) if num_tokens else math.nan
        skipped = overflow or (max_loss is not None and not loss < max_loss)  # NaN is not below
        if not skipped:
            factor = min(1.0, self._clip_norm / (grad_norm + 1e-6)) if self._clip_norm else 1.0
            self._multiply_gradients(factor / self.scale.value)
            set_rates(self.optimizer, lr)
            self.optimizer.step()
            if self._kept_zeros is not None:
                self._kept_zeros.restore()
        self.optimizer.zero_grad(set_to_none=True)
        if overflow or not skipped:
            self.scale.update(overflow=overflow)
        return StepResult(
            loss=loss,
            grad_norm=None if skipped else grad_norm,
            tokens=int(num_tokens),
            skipped=skipped,
            nonfinite_ranks=() if math.isfinite(loss) else ranks_with_nonfinite(own_sum.item(), device=self._device),
            preempted=num_preempted > 0,
        )

    def _norm(self) -> Tensor:
        """Return the L2 norm of the whole gradient, an fp64 scalar: each element counts once."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for (mesh, dims), gradients in self._by_sharding().items():
            square = nn.utils.get_total_norm(gradients).double().to(self._device) ** 2
            for dim in dims:
                assert mesh is not None, "what is sharded is sharded over a mesh"
                dist.all_reduce(square, group=mesh.get_group(dim))
            total += square
        if self._stages is not None:
            dist.all_reduce(total, group=self._stages)
        return total.sqrt()

    def _by_sharding(self) -> dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]]:
        """Return this rank's parts of the counted gradients, by the mesh dimensions that shard them."""
        found: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = defaultdict(list)
        for parameter in self._counted:
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                dims = tuple(dim for dim, placement in enumerate(gradient.placements) if not placement.is_replicate())
                found[gradient.device_mesh, dims].append(gradient.to_local())
            elif gradient is not None:
                found[None, ()].append(gradient)
        return found

    def _multiply_gradients(self, factor: float) -> None:
        if factor != 1.0:
            torch._foreach_mul_([local_shard(p.grad) for p in self._parameters if p.grad is not None], factor)


def make_optimizer(
    options: Optimizer, groups: list[dict[str, Any]], *, names: Mapping[nn.Parameter, str]
) -> torch.optim.Optimizer:
    """Return the optimizer of these groups of parameters.

    Its factory gets ``(name, parameter)`` pairs as ``params`` of each group, which torch's optimizers take too.

    Args:
        options: of the run.
        groups: as :func:`parameter_groups` returns them.
        names: of the parameters in the model.

    Raises:
        ConfigError: there is nothing to train.
        JobError: the factory is a plugin's, and left out or added parameters.
        PluginError: it raised an exception.
    """
    if not groups:
        raise ConfigError("job.transforms", why="they leave no parameter to train", fix="leave one unfrozen")
    make = executor("optimizer", options.kind, OPTIMIZERS)
    given = [parameter for group in groups for parameter in group["params"]]
    named = [{**group, "params": [(names[each], each) for each in group["params"]]} for group in groups]
    with named_in_errors("optimizer", options.kind) if options.kind not in OPTIMIZERS else nullcontext():
        made: torch.optim.Optimizer = make(options, named)
        taken = {id(parameter) for group in made.param_groups for parameter in group["params"]}
        if lost := [names[parameter] for parameter in given if id(parameter) not in taken]:
            fix = "freeze them by a transform (parameter.requires_grad = False) instead"
            raise JobError(f"it leaves out {len(lost)} parameters, {lost[0]} first; {fix}")
        if len(taken) > len(given):
            raise JobError("it updates parameters that it was not given")
    return made


def parameter_names(models: Sequence[nn.Module]) -> dict[nn.Parameter, str]:
    """Return the parameters of models with their first names, in order."""
    names: dict[nn.Parameter, str] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            names.setdefault(parameter, name)
    return names


def set_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of a step, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class LossScale:
    """Multiplies the loss so that small gradients survive fp16; other precisions keep 1.

    Args:
        precision: of the run.
    """

    def __init__(self, precision: Precision) -> None:
        self._settings = precision if isinstance(precision, Fp16Precision) else None
        self.value = 2.0**precision.initial_scale_power if isinstance(precision, Fp16Precision) else 1.0
        self._hysteresis = precision.hysteresis if isinstance(precision, Fp16Precision) else 1
        self._good_steps = 0

    def update(self, *, overflow: bool) -> None:
        """Halve after overflows beyond the hysteresis, double after a window of steps without one."""
        if self._settings is None:
            return
        if overflow:
            self._good_steps = 0
            if self._hysteresis == 1:
                self.value = max(self.value / 2, self._settings.min_scale)
            else:
                self._hysteresis -= 1
            return
        self._good_steps += 1
        if self._good_steps > 1 and (self._good_steps - 1) % self._settings.scale_window == 0:
            self._hysteresis = self._settings.hysteresis
            self.value *= 2

    def state(self) -> dict[str, float]:
        """Return the state that ``restore`` takes; other precisions than fp16 have none."""
        if self._settings is None:
            return {}
        return {"value": self.value, "hysteresis": self._hysteresis, "good_steps": self._good_steps}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from a saved state; a run of another precision, or from one, keeps its own."""
        if self._settings is None or not state:
            return
        self.value = state["value"]
        self._hysteresis, self._good_steps = int(state["hysteresis"]), int(state["good_steps"])


def parameter_groups(
    names: Mapping[nn.Parameter, str], options: Optimizer, *, hidden: Collection[nn.Parameter] | None = None
) -> list[dict[str, Any]]:
    """Return optimizer groups: one for each pattern, and those of other parameters.

    Matrices decay, biases and norms do not, but where a pattern sets the decay. Under ZeRO-3 a parameter is empty and
    its true shape is in ``ds_shape``.

    Args:
        names: of all parameters; frozen ones are left out.
        options: of the run.
        hidden: matrices of the model's blocks, for optimizers that treat them otherwise: their groups are marked.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    marked = None if hidden is None else set(map(id, hidden))
    for parameter, name in names.items():
        if not parameter.requires_grad:
            continue
        number, is_matrix = options.group_of(name), len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        chosen = None if number is None else options.groups[number]
        group: dict[str, Any] = {"params": [], "weight_decay": options.weight_decay if is_matrix else 0.0}
        if chosen is not None:
            group |= {} if chosen.weight_decay is None else {"weight_decay": chosen.weight_decay}
            group["lr_scale"] = chosen.lr_scale
        if marked is not None:
            group["is_hidden"] = id(parameter) in marked
        # one call of the optimizer takes parameters of one sharding only
        mesh = getattr(parameter, "device_mesh", None)
        key = (number is not None, number, not is_matrix, not group.get("is_hidden"), mesh)
        found.setdefault(key, group)["params"].append(parameter)
    return [found[key] for key in sorted(found, key=_without_mesh)]


def _without_mesh(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what groups are sorted by; those of other meshes stay in the order of the model."""
    has_number, number, *flags, _ = key
    return (has_number, number or 0, *flags)


def check_groups(options: Optimizer, parameters: Mapping[nn.Parameter, str], *, device: torch.device) -> None:
    """Raise where a group of the options has no parameter that is trained on any rank.

    Args:
        options: of the run.
        parameters: of this rank, with their names.
        device: where this rank computes.

    Raises:
        ConfigError: it changes nothing.
    """
    if not options.groups:
        return
    names = [name for parameter, name in parameters.items() if parameter.requires_grad]
    numbers = [options.group_of(name) for name in names]
    counts = sum_over_ranks([float(numbers.count(number)) for number in range(len(options.groups))], device=device)
    for number, count in enumerate(counts):
        if not count:
            raise options.group_without(number, names)


def _hidden_matrices(models: Sequence[nn.Module], options: Optimizer) -> list[nn.Parameter] | None:
    """Return the matrices of the models' blocks, for Muon; ``None`` for other optimizers."""
    if not isinstance(options, Muon):
        return None
    inside = [block for model in models for block in blocks(cast("PreTrainedModel", model))]
    return [parameter for block in inside for parameter in block.parameters() if parameter.ndim == 2]
