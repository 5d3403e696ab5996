"""Tensor parallelism by Transformers' plan for a model, carried out with torch's DTensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from launcher.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

_STYLES: Mapping[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


class TensorPlan:
    """Slices the matrices of a model's blocks over the ranks of ``mesh``.

    Embeddings and the output head stay whole: they are often one tied matrix, and the loss wants it whole.

    Args:
        model: laid out, with or without storage.
        mesh: of the tensor-parallel ranks.

    Raises:
        ConfigError: Transformers has no plan for the model, or one with a style that is not carried out here.
    """

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        own = model.config.base_model_tp_plan or {}
        self._styles = [(re.compile(_plan_regex(f"{prefix}{name}")), style) for name, style in own.items()]
        strange = sorted({style for style in own.values() if style not in _STYLES})
        if not own or strange:
            why = f"with styles {', '.join(strange)} that the launcher does not support" if strange else "at all"
            why = f"Transformers has no tensor plan for {model.config.model_type} {why}"
            raise ConfigError("parallel.tensor", mesh.size(), why=why, fix="set parallel.tensor=1")

    def slice(self, name: str, part: nn.Module) -> None:
        """Keep this rank's slices of one part of the model, filled and whole on every rank."""
        plan = {}
        for path, _ in part.named_modules():
            style = self._style_of(f"{name}.{path}")
            if style is not None:
                plan[path] = style
        if plan:
            parallelize_module(part, self._mesh, plan)

    def _style_of(self, name: str) -> ParallelStyle | None:
        for pattern, style in self._styles:
            if pattern.fullmatch(name):
                return _STYLES[style]()
        return None


def _plan_regex(name: str) -> str:
    """Return a plan key's regular expression; ``*`` stands for the number of a block."""
    return r"\d+".join(re.escape(piece) for piece in name.split("*"))
