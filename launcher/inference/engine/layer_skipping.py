"""Run some layers of a stock model: those before an exit, or those behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from launcher.errors import ConfigError
from launcher.models.layers import blocks

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class LayerStep(Protocol):
    """One step, as layers get it."""

    first_layer: int
    exit_layer: int
    slot_mapping: Tensor


class ExitStates:
    """Hidden states at the exit, kept until the layers behind it have run.

    Args:
        model: whose layers skip themselves from now on where a plan says so.

    Raises:
        ConfigError: its layers are not found.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._slots: list[Tensor] = []
        self._hidden: list[Tensor] = []
        layers = blocks(model)
        if len(layers) != model.config.get_text_config().num_hidden_layers:
            why = f"the layers of {model.config.model_type} are not one list of blocks in its base model"
            raise ConfigError("job.speculation", "early_exit", why=why, fix="set job.speculation=none")
        for number, block in enumerate(layers):
            block.forward = self._skipping(block, number)

    def clear(self) -> None:
        """Forget all."""
        self._slots, self._hidden = [], []

    def _skipping(self, block: nn.Module, number: int) -> Callable[..., Any]:
        """Return the forward method of a layer that skips itself."""
        forward = block.forward

        def run(hidden_states: Tensor, *rest: Any, launcher_step: LayerStep, **named: Any) -> Any:
            first, end = launcher_step.first_layer, launcher_step.exit_layer
            if end and number >= end:
                if number == end:
                    self._slots.append(launcher_step.slot_mapping)
                    self._hidden.append(hidden_states)
                return hidden_states
            if number < first:
                return hidden_states
            if first and number == first:
                hidden_states = self._at(launcher_step.slot_mapping)
            return forward(hidden_states, *rest, launcher_step=launcher_step, **named)

        return run

    def _at(self, slots: Tensor) -> Tensor:
        """Return the states of tokens by their places in the KV cache, (1, tokens, width)."""
        known, order = torch.cat(self._slots).sort()
        return torch.cat(self._hidden, dim=1)[:, order[torch.searchsorted(known, slots)]]
