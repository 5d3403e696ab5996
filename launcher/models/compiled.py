"""torch.compile, put on the blocks of a model in place: names of modules and parameters stay as they are."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from launcher.compile import CompiledBlocks, lacks_compiler, quote_torch_libraries
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.compile import Compile, quote_torch_libraries


def apply_compile(module: nn.Module, compile_: Compile, *, device: torch.device) -> None:
    """Have each block of ``module`` compiled at its first use; blocks of the same make share one compilation.

    Each block must compile as a whole: with ``fullgraph`` torch ends the run and shows the line it cannot compile,
    where it would otherwise fall back to Python without a word.

    Args:
        module: anything that holds blocks of Transformers, activation checkpointing applied and not yet wrapped.
        compile_: whether to compile.
        device: where the module will run.

    Raises:
        ConfigError: there are no blocks, or no C++ compiler for the CPU.
    """
    if not isinstance(compile_, CompiledBlocks):
        return
    if device.type == "cpu" and lacks_compiler(os.environ, which=shutil.which):
        raise compile_.no_compiler()
    blocks = repeated_blocks(module)
    if not blocks:
        why = f"{type(module).__name__} has no blocks of the kind that Transformers repeats"
        raise ConfigError("compile", "true", why=why, fix="set compile=false")
    quote_torch_libraries()
    for block in blocks:
        block.compile(fullgraph=True)


def interpreted(module: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Return a context in which blocks run uncompiled: a cache that grows by a token a call would compile each time."""
    if any(block._compiled_call_impl is not None for block in repeated_blocks(module)):  # noqa: SLF001
        stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the blocks that Transformers repeats, in their order."""
    return [block for block in module.modules() if isinstance(block, GradientCheckpointingLayer)]
