"""Change a built model in place: activation checkpointing, torch.compile, float8."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from launcher.config.activation import FullCheckpointing, OffloadCheckpointing, SelectiveCheckpointing
from launcher.config.compile import RegionalCompile
from launcher.config.precision import FP8_MULTIPLE, Fp8Precision
from launcher.errors import ConfigError
from launcher.utils.build_cache import lacks_compiler, quote_torch_library_path

if TYPE_CHECKING:
    from launcher.config.activation import ActivationCheckpointing
    from launcher.config.compile import Compile
    from launcher.config.precision import Precision


def apply_activation_checkpointing(module: nn.Module, activation: ActivationCheckpointing) -> None:
    """Make the blocks of ``module`` recompute activations in the backward pass of training.

    Transformers' own switch is not used: its name and its options differ between versions, and it is a method of whole
    models, while this takes a pipeline stage too. Both set the same two attributes of a block.

    Args:
        module: anything that holds blocks of Transformers, before data parallelism wraps it.
        activation: which of the blocks recompute, counted from the first block of ``module``.

    Raises:
        ConfigError: the model's blocks are not of the kind that can recompute themselves.
    """
    every = activation.k if isinstance(activation, SelectiveCheckpointing) else 1
    if not isinstance(activation, FullCheckpointing | SelectiveCheckpointing | OffloadCheckpointing):
        return
    blocks = [block for block in module.modules() if isinstance(block, GradientCheckpointingLayer)]
    if not blocks:
        why = f"Transformers does not support activation checkpointing for {type(module).__name__}"
        raise ConfigError("activation", activation.kind, why=why, fix="set activation=none")
    run = _run_offloaded if isinstance(activation, OffloadCheckpointing) else checkpoint
    for number, block in enumerate(blocks):
        block._gradient_checkpointing_func = functools.partial(run, use_reentrant=False)  # noqa: SLF001
        block.gradient_checkpointing = number % every == 0
    if hasattr(module, "config"):
        module.config.use_cache = False  # a block that is recomputed cannot also fill a cache


def _run_offloaded(block: Callable[..., Any], hidden: torch.Tensor, *rest: Any, use_reentrant: bool) -> Any:
    """Run a block under checkpoint, its saved inputs in host RAM.

    What it saves on recomputing stays.
    """
    with torch.autograd.graph.save_on_cpu(pin_memory=hidden.is_cuda):
        return checkpoint(block, hidden, *rest, use_reentrant=use_reentrant)


def apply_compile(module: nn.Module, compile_: Compile, *, device: torch.device) -> None:
    """Compile each block of ``module`` at its first use; equal blocks share the code.

    Each block must compile as a whole: with ``fullgraph`` torch ends the run and shows the line it cannot compile,
    where it would otherwise fall back to Python without a word.

    Args:
        module: anything that holds blocks of Transformers, activation checkpointing applied and not yet wrapped.
        compile_: whether to compile.
        device: where the module will run.

    Raises:
        ConfigError: there are no blocks, or no C++ compiler for the CPU.
    """
    if not isinstance(compile_, RegionalCompile):
        return
    if device.type == "cpu" and lacks_compiler(os.environ, which=shutil.which):
        raise compile_.no_compiler()
    blocks = repeated_blocks(module)
    if not blocks:
        why = f"{type(module).__name__} has no blocks that repeat, and only such blocks are compiled"
        raise ConfigError("compile", "true", why=why, fix="set compile=false")
    quote_torch_library_path()
    for block in blocks:
        block.compile(fullgraph=True)


def without_compile(module: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Return a context in which blocks run uncompiled.

    A cache that grows by a token a call would compile each time.
    """
    if any(block._compiled_call_impl is not None for block in repeated_blocks(module)):  # noqa: SLF001
        stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the blocks that Transformers repeats, in their order."""
    return [block for block in module.modules() if isinstance(block, GradientCheckpointingLayer)]


def apply_float8(module: nn.Module, precision: Precision) -> None:
    """Make the linear layers in the blocks multiply in 8 bits; weights and names stay.

    The output head and the embedding stay as they are: their errors weigh most.

    Args:
        module: anything that holds blocks of Transformers, before anything wraps it.
        precision: does something where it is ``Fp8``.

    Raises:
        ConfigError: torchao is not installed; there are no linear layers; or the sizes of one do not fit the hardware.
    """
    if not isinstance(precision, Fp8Precision):
        return
    for problem in precision.validate_machine():
        raise problem
    from torchao.float8 import convert_to_float8_training

    layers = [
        layer
        for block in module.modules()
        if isinstance(block, GradientCheckpointingLayer)
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    ]
    if not layers:
        why = f"the blocks of {type(module).__name__} hold no torch.nn.Linear, and torchao converts nothing else"
        raise ConfigError("precision", Fp8Precision.kind, why=why, fix="set precision=bf16")
    for layer in layers:
        if layer.in_features % FP8_MULTIPLE or layer.out_features % FP8_MULTIPLE:
            why = f"a layer of {layer.in_features} × {layer.out_features} needs multiples of {FP8_MULTIPLE}"
            raise ConfigError("precision", Fp8Precision.kind, why=why, fix="set precision=bf16")
    convert_to_float8_training(module, module_filter_fn=lambda layer, _: any(layer is one for one in layers))
