"""Activation checkpointing, put on the blocks of a model that has been built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from launcher.activation import Offload, Recompute, RecomputeEvery
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.activation import Activation


def apply_activation(module: nn.Module, activation: Activation) -> None:
    """Make the blocks of ``module`` recompute what ``activation`` says, in the backward pass of training mode only.

    Transformers' own switch is not used: its name and its options differ between versions, and it is a method of whole
    models, while this takes a pipeline stage too. Both set the same two attributes of a block.

    Args:
        module: anything that holds blocks of Transformers, before data parallelism wraps it.
        activation: which of the blocks recompute, counted from the first block of ``module``.

    Raises:
        ConfigError: the model's blocks are not of the kind that can recompute themselves.
    """
    every = activation.k if isinstance(activation, RecomputeEvery) else 1
    if not isinstance(activation, Recompute | RecomputeEvery | Offload):
        return
    blocks = [block for block in module.modules() if isinstance(block, GradientCheckpointingLayer)]
    if not blocks:
        why = f"the blocks of {type(module).__name__} cannot recompute themselves in Transformers"
        raise ConfigError("activation", activation.kind, why=why, fix="set activation=none")
    run = _run_offloaded if isinstance(activation, Offload) else checkpoint
    for number, block in enumerate(blocks):
        block._gradient_checkpointing_func = functools.partial(run, use_reentrant=False)  # noqa: SLF001
        block.gradient_checkpointing = number % every == 0
    if hasattr(module, "config"):
        module.config.use_cache = False  # a block that is recomputed cannot also fill a cache


def _run_offloaded(block: Callable[..., Any], hidden: torch.Tensor, *rest: Any, use_reentrant: bool) -> Any:
    """Run a block under checkpoint, whose saved inputs go to host RAM; what it saves on recomputing stays."""
    with torch.autograd.graph.save_on_cpu(pin_memory=hidden.is_cuda):
        return checkpoint(block, hidden, *rest, use_reentrant=use_reentrant)
