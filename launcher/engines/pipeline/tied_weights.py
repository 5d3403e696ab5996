"""Weights that the first and last chunk share, and the names of weights in checkpoints.

A checkpoint has each tensor under its name in the whole model, so any stages and shards can read it. AdamW's state
of a weight is under ``exp_avg.<name>``, ``exp_avg_sq.<name>`` and ``step.<name>``. A tied parameter is there once,
under its first name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist

from launcher.engines.model_state import local_shard
from launcher.engines.state import optimizer_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

    from launcher.engines.pipeline.stage import ModelChunk


class TiedWeights:
    """Copies of tied parameters on this rank; :meth:`sum_gradients` makes gradients equal.

    Equal copies with equal gradients stay equal to the bit: the sum of two numbers does not depend on their order, and
    the update of one does not depend on the others.

    Args:
        own: this rank's chunks.
        names: of tied parameters: further name to first name.
        group: the ranks of this pipeline.
        ends: ranks in ``group`` of the first and of the last chunk.
        share: keep one parameter where both are on this rank.
    """

    def __init__(
        self,
        own: Sequence[ModelChunk],
        names: Mapping[str, str],
        *,
        group: ProcessGroup,
        ends: tuple[int, int],
        share: bool,
    ) -> None:
        self._group = group
        self._first = [s.model.get_parameter(name) for s in own if s.first for name in names.values()]
        if share and ends[0] == ends[1]:
            for chunk in own:
                if chunk.last:
                    _replace(chunk.model, dict(zip(names, self._first, strict=bool(self._first))))
        self._last = [s.model.get_parameter(name) for s in own if s.last for name in names]
        here = dist.get_rank(group)
        self._peer = next((dist.get_global_rank(group, rank) for rank in ends if rank != here), None)

    @property
    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Copies that are both on this rank, that of the first chunk first."""
        both = zip(self._first, self._last, strict=True) if self._first and self._last else ()
        return [(one, other) for one, other in both if one is not other]

    @property
    def counted_elsewhere(self) -> list[nn.Parameter]:
        """Copies of parameters that are counted where the first chunk is."""
        shared = set(map(id, self._first))
        return [parameter for parameter in self._last if id(parameter) not in shared]

    def sum_gradients(self) -> None:
        """Give each copy the sum of the gradients of all; every rank of the pipeline calls it."""
        if not all(parameter.requires_grad for parameter in (*self._first, *self._last)):
            return  # frozen at both ends
        if self._first and self._last:
            for one, other in self.pairs:
                local_shard(one.grad).add_(local_shard(other.grad))
                local_shard(other.grad).copy_(local_shard(one.grad))
            return
        for parameter in self._first or self._last:
            assert parameter.grad is not None, "embedding and head take part in every step"
            self._swap(local_shard(parameter.grad))

    def _swap(self, gradient: torch.Tensor) -> None:
        """Add the gradient of the other end; only these two stages communicate."""
        if gradient.numel() == 0:  # a shard beyond the end of a small parameter, the same there
            return
        assert self._peer is not None, "with one end here, the other is elsewhere"
        received = torch.empty_like(gradient)
        sending = dist.P2POp(dist.isend, gradient, self._peer, self._group)
        receiving = dist.P2POp(dist.irecv, received, self._peer, self._group)
        for work in dist.batch_isend_irecv([sending, receiving]):
            work.wait()
        gradient.add_(received)


def _replace(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, parameter)


_TWIN = " (twin)"
"""Ends the name of a copy whose first one is on the same rank."""


def named_state(
    own: Sequence[ModelChunk],
    optimizer: torch.optim.Optimizer,
    tied: Mapping[str, str],
    *,
    state_names: Sequence[str],
    adapter_only: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights and moments by name, sharing storage, and the copies of tied ones.

    Args:
        own: this rank's chunks.
        optimizer: of all their parameters.
        tied: further names of tied parameters, each with the first name.
        state_names: of the optimizer's state of each parameter, as :func:`optimizer_tensors` takes them.
        adapter_only: leave out all that is not trained.
    """
    names: dict[nn.Parameter, str] = {}
    for chunk in own:
        for name, parameter in chunk.model.named_parameters():
            if parameter in names or (adapter_only and not parameter.requires_grad):
                continue
            known = tied.get(name, name)
            names[parameter] = known + _TWIN if known in names.values() else known
    tensors = {name: parameter.detach() for parameter, name in names.items()}
    tensors |= optimizer_tensors(optimizer, names, state_names=state_names)
    twins = {name.removesuffix(_TWIN): tensor for name, tensor in tensors.items() if name.endswith(_TWIN)}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_TWIN)}, twins


def copy_to_twins(tensors: Mapping[str, Tensor], twins: Mapping[str, Tensor]) -> None:
    """Make each twin equal to the tensor of its name."""
    for name, twin in twins.items():
        twin.copy_(tensors[name])
