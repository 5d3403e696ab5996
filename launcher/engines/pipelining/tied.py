"""Weights that the first and the last stretch share: the token embedding that is the output projection too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist
from torch import nn

from launcher.engines.pipelining.cut import anatomy_of
from launcher.engines.update import local
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

    from launcher.engines.pipelining.stage import Stretch


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Return each further name of a parameter of a whole model, with its first name.

    Raises:
        ConfigError: blocks share parameters, which may come to lie on any stages.
    """
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    inside = f"{model.base_model_prefix}.{anatomy_of(model).blocks}."
    for names in found.items():
        if any(name.startswith(inside) for name in names):
            why = f"{' and '.join(names)} are one parameter, and blocks lie on different stages"
            raise ConfigError("parallel", "pipeline", why=why, fix="set parallel=fsdp")
    return found


class Tied:
    """The copies of tied parameters on this rank; after :meth:`sum_gradients` all copies have the same gradient.

    Equal copies with equal gradients stay equal to the bit: the sum of two numbers does not depend on their order, and
    the update of one does not depend on the others.

    Args:
        own: this rank's stretches.
        names: of tied parameters: further name to first name.
        group: the ranks of this pipeline.
        ends: ranks in ``group`` of the first and of the last stretch.
        share: keep one parameter where both are on this rank.
    """

    def __init__(
        self,
        own: Sequence[Stretch],
        names: Mapping[str, str],
        *,
        group: ProcessGroup,
        ends: tuple[int, int],
        share: bool,
    ) -> None:
        self._group = group
        self._first = [s.model.get_parameter(name) for s in own if s.first for name in names.values()]
        if share and ends[0] == ends[1]:
            for stretch in own:
                if stretch.last:
                    _replace(stretch.model, dict(zip(names, self._first, strict=bool(self._first))))
        self._last = [s.model.get_parameter(name) for s in own if s.last for name in names]
        here = dist.get_rank(group)
        self._peer = next((dist.get_global_rank(group, rank) for rank in ends if rank != here), None)

    @property
    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Copies that are both on this rank, that of the first stretch first."""
        both = zip(self._first, self._last, strict=True) if self._first and self._last else ()
        return [(one, other) for one, other in both if one is not other]

    @property
    def counted_elsewhere(self) -> list[nn.Parameter]:
        """Copies of parameters that are counted where the first stretch is."""
        shared = set(map(id, self._first))
        return [parameter for parameter in self._last if id(parameter) not in shared]

    def sum_gradients(self) -> None:
        """Give each copy the sum of the gradients of all; every rank of the pipeline calls it."""
        if self._first and self._last:
            for one, other in self.pairs:
                local(one.grad).add_(local(other.grad))
                local(other.grad).copy_(local(one.grad))
            return
        for parameter in self._first or self._last:
            assert parameter.grad is not None, "embedding and head take part in every step"
            self._swap(local(parameter.grad))

    def _swap(self, gradient: torch.Tensor) -> None:
        """Add the other end's gradient; the two talk to nobody else."""
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
