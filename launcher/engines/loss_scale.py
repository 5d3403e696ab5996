"""Dynamic loss scale of fp16 (Micikevicius et al., 2018, arXiv:1710.03740), in the way DeepSpeed moves it."""

from __future__ import annotations

from launcher.precision import Fp16, Precision


class LossScale:
    """Multiplies the loss so that small gradients survive fp16; other precisions keep 1.

    Args:
        precision: of the run.
    """

    def __init__(self, precision: Precision) -> None:
        self._settings = precision if isinstance(precision, Fp16) else None
        self.value = 2.0**precision.initial_scale_power if isinstance(precision, Fp16) else 1.0
        self._hysteresis = precision.hysteresis if isinstance(precision, Fp16) else 1
        self._good_steps = 0

    def update(self, *, overflow: bool) -> None:
        """Halve after as many overflows as the hysteresis allows, double after a window of steps without one."""
        if self._settings is None:
            return
        if overflow:
            self._good_steps = 0
            if self._hysteresis == 1:
                self.value = max(self.value / 2, self._settings.min_scale)
            else:
                self._hysteresis -= 1
            return
        self._good_steps += 1
        if self._good_steps > 1 and (self._good_steps - 1) % self._settings.scale_window == 0:
            self._hysteresis = self._settings.hysteresis
            self.value *= 2

    def state(self) -> dict[str, float]:
        """Return what ``restore`` takes."""
        return {"value": self.value, "hysteresis": self._hysteresis, "good_steps": self._good_steps}

    def restore(self, state: dict[str, float]) -> None:
        """Continue from a saved state."""
        self.value = state["value"]
        self._hysteresis, self._good_steps = int(state["hysteresis"]), int(state["good_steps"])
