"""The tensors of a checkpoint of another program, under that program's names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint.foreign.torch_pickle import stored_tensor
from launcher.checkpoint.regions import FlatRange, whole
from launcher.checkpoint.tensors import StoredState

MOMENTS = ("exp_avg", "exp_avg_sq")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(kw_only=True)
class ForeignTensors:
    """What readers of the formats return."""

    weights: StoredState = field(default_factory=StoredState)
    """By parameter."""
    moments: StoredState = field(default_factory=StoredState)
    """``exp_avg.<parameter>``, ``exp_avg_sq.<parameter>`` and ``step.<parameter>``."""
    order: list[list[str]] | None = None
    """Numbers that stand for parameters in the names of ``moments``, a list a group.
    ``None`` if moments have the parameters' names."""
    step: int | None = None
    """Optimizer steps done, where the files say so."""

    def optimizer_step(self) -> int | None:
        """Return the optimizer's own count of its steps."""
        names = [name for name in self.moments.shapes if name.startswith("step.")]
        return max((int(self.moments.read(name).item()) for name in names), default=None)


def clean_name(name: str) -> str:
    """Return a parameter's name without what ``torch.compile``, FSDP and DDP put around it."""
    return _WRAPPERS.sub("", name).removeprefix("module.")


def add_whole(state: StoredState, name: str, value: Any, file: Path) -> None:
    """Add a tensor that a file holds whole.

    Raises:
        ValueError: it is none.
    """
    tensor = stored_tensor(value)
    shape = tuple(tensor.shape)
    state.add(name, shape, whole(shape), tensor, dtype=tensor.dtype, file=file)


def add_step(state: StoredState, parameter: str, value: Any, file: Path) -> None:
    """Add an optimizer's count of the steps of a parameter, which is a tensor or a number.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = stored_tensor(value).reshape(()).item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"the optimizer's step of {parameter} is no number")  # noqa: TRY004
    add_whole(state, f"step.{parameter}", torch.tensor(float(value)), file)


def add_by_order(found: ForeignTensors, tree: Any, file: Path) -> None:
    """Add the state of a torch optimizer, as its ``state_dict`` returns it.

    Its parameters are numbered, or have names (``get_optimizer_state_dict``).

    Raises:
        ValueError: it is not of AdamW.
    """
    states, groups = tree["state"], tree["param_groups"]
    if not isinstance(states, Mapping) or not isinstance(groups, Sequence):
        raise ValueError("it holds no state of an optimizer")  # noqa: TRY004
    if not states:
        return
    names: dict[Any, str] = {}
    for group in groups:
        if "param_names" in group:  # of an optimizer that was given named parameters
            names |= dict(zip(group["params"], group["param_names"], strict=True))
    if not names and any(isinstance(key, int) for key in states):
        found.order = [[str(key) for key in group["params"]] for group in groups]
    for key, state in states.items():
        _check_adamw(state)
        parameter = clean_name(str(names.get(key, key)))
        for name in MOMENTS:
            add_whole(found.moments, f"{name}.{parameter}", state[name], file)
        add_step(found.moments, parameter, state["step"], file)


def _check_adamw(state: Any) -> None:
    missing = [name for name in ("step", *MOMENTS) if name not in state]
    if missing:
        kept = ", ".join(sorted(map(str, state))) or "nothing"
        raise ValueError(f"its optimizer is not AdamW: it keeps {kept}, without {missing[0]}")


def add_flat(state: StoredState, name: str, shape: tuple[int, ...], start: int, values: Tensor, file: Path) -> None:
    """Add elements of a tensor from ``start`` of its flattened form on."""
    values = stored_tensor(values).reshape(-1)
    region = FlatRange(start, start + values.numel())
    state.add(name, shape, region, values, dtype=values.dtype, file=file)
