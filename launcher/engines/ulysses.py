"""Sequence parallelism: each rank has its own tokens, and its own heads in attention.

Around attention the ranks swap tokens for heads, all to all (DeepSpeed-Ulysses, Jacobs et al., 2023, arXiv:2309.14509),
so any kernel computes it on whole sequences. It comes in through Transformers' registry of attention functions, and no
model code changes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launcher.config.model.config_json import sequence_sharding_problem
from launcher.config.supported_models import whole_sequence_error
from launcher.models.attention import class_attention_support
from launcher.models.layers import causal_mask

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

    from launcher.data.dataloader import MicroBatch

_NAME = "launcher_ulysses"


class _Swap(torch.autograd.Function):  # type: ignore[misc]
    """All-to-all: split dimension ``cut`` over ranks, concatenate along ``join``; and back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup, cut: int, join: int) -> Tensor:
        ctx.group, ctx.cut, ctx.join = group, cut, join
        return _swap(tensor, group, cut=cut, join=join)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return _swap(gradients[0], ctx.group, cut=ctx.join, join=ctx.cut), None, None, None


def _swap(tensor: Tensor, group: ProcessGroup, *, cut: int, join: int) -> Tensor:
    size = dist.get_world_size(group)
    sent = torch.stack(tensor.chunk(size, dim=cut)).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), dim=join)


def check_cut(model: PreTrainedModel, *, degree: int, length: int) -> None:
    """Raise unless ranks can split the model's sequences.

    The plan knows this only of models on its machine.

    Raises:
        ConfigError: some layers do more than attend to whole sequences.
    """
    why = sequence_sharding_problem(model.config.to_dict(), class_attention_support(type(model)), length=length)
    if why is not None:
        raise whole_sequence_error(degree, why)


class SequenceParallel:
    """Splits sequences over the ranks of ``group`` for one model.

    Args:
        model: whose attention is to see whole sequences; its own kernel, a causal one, computes it.
        group: of the ranks that share each sequence.
    """

    def __init__(self, model: PreTrainedModel, group: ProcessGroup) -> None:
        self._group, self._rank, self._size = group, dist.get_rank(group), dist.get_world_size(group)
        self._inner = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]  # noqa: SLF001
        self._inner_name: str = model.config._attn_implementation  # noqa: SLF001
        self._splits = False
        self._positions: Tensor | None = None
        self._config = copy.copy(model.config)
        AttentionInterface.register(_NAME, self._attend)
        AttentionMaskInterface.register(_NAME, self._mask)
        model.config._attn_implementation = _NAME  # noqa: SLF001

    def share_of(self, whole: MicroBatch) -> MicroBatch:
        """Return this rank's part of each sequence, and its positions."""
        length = whole.input_ids.shape[1] // self._size
        own = slice(self._rank * length, (self._rank + 1) * length)
        if whole.position_ids is None:
            positions = torch.arange(own.start, own.stop)[None]
        else:
            positions = whole.position_ids[:, own]
        return replace(whole, input_ids=whole.input_ids[:, own], labels=whole.labels[:, own], position_ids=positions)

    @contextlib.contextmanager
    def splitting(self, whole: MicroBatch) -> Iterator[None]:
        """In this context the model gets parts of the sequences of ``whole``; outside, whole ones."""
        self._splits, self._positions = True, whole.position_ids
        try:
            yield
        finally:
            self._splits, self._positions = False, None

    def _mask(self, *args: Any, **kwargs: Any) -> Any:
        """Return the kernel's mask for what it attends to: whole sequences.

        Rows of one document are causal, which takes no mask. Where several are packed into a row, the mask is of the
        whole row, not of the part that this rank gives the model.
        """
        if not self._splits:
            return ALL_MASK_ATTENTION_FUNCTIONS[self._inner_name](*args, **kwargs)
        if self._positions is None:
            return None
        positions = self._positions.to(kwargs["device"])
        dtype = kwargs.get("dtype", torch.float32)
        return causal_mask(
            self._config, torch.empty(*positions.shape, 1, dtype=dtype, device=positions.device), positions
        )

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention for (sequences, heads, tokens, width); return (…, tokens, heads, width)."""
        if not self._splits:
            answer: tuple[Tensor, Tensor | None] = self._inner(module, query, key, value, attention_mask, **options)
            return answer
        options.pop("position_ids", None)  # of this rank's tokens: the kernel sees all of them
        if key.shape[1] % self._size:  # key heads that do not divide by the ranks: each query head gets its own copy
            shared_by = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(shared_by, dim=1) for tensor in (key, value))
        query, key, value = (_Swap.apply(tensor, self._group, 1, 2) for tensor in (query, key, value))
        attended, _ = self._inner(_Grouped(module, query, key), query, key, value, attention_mask, **options)
        return _Swap.apply(attended, self._group, 1, 2), None


class _Grouped:
    """An attention module whose key heads are shared by as many query heads as here."""

    def __init__(self, module: nn.Module, query: Tensor, key: Tensor) -> None:
        self._module = module
        self.num_key_value_groups = query.shape[1] // key.shape[1]
        self.is_causal = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
