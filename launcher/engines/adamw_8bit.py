"""AdamW with 8-bit moments, by bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.optim import AdamW8bit as BitsandbytesAdamW8bit
from torch import Tensor, nn

from launcher.engines.optimizer import unnamed

if TYPE_CHECKING:
    from launcher.config.optimizer import AdamW8bit

_SAVED = ("step", "state1", "state2", "absmax1", "absmax2")
"""State that changes: codes and scales of blocks; the tables of codes are constants."""


class ResumableAdamW8bit(BitsandbytesAdamW8bit):  # type: ignore[misc]
    """bitsandbytes' AdamW8bit, whose number of steps is a tensor, as torch's have it."""

    def init_state(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Create the state of a parameter."""
        super().init_state(group, p, gindex, pindex)
        self.state[p]["step"] = torch.zeros((), dtype=torch.float32)

    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Update a parameter."""
        state = self.state[p]
        step = state["step"]
        state["step"] = int(step)
        super().update_step(group, p, gindex, pindex)
        state["step"] = step.fill_(state["step"])

    def saved_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the state of a parameter by name, created if missing."""
        if not self.state[parameter]:
            for gindex, group in enumerate(self.param_groups):
                for pindex, each in enumerate(group["params"]):
                    if each is parameter:
                        self.init_state(group, parameter, gindex, pindex)
        state = self.state[parameter]
        return {name: state[name] for name in _SAVED if name in state}


def make_adamw_8bit(options: AdamW8bit, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW with moments in 8 bits."""
    made: torch.optim.Optimizer = ResumableAdamW8bit(
        unnamed(groups), lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    return made
