"""Values that sampling goes wrong with: subnormal, huge, at each boundary and beside it; and scores to try them on."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from launcher.config.sampling import LOGIT_BIAS_RANGE, NUM_CHOICES_RANGE, PRIORITY_RANGE, RANGES, ParameterRange
from launcher.inference.engine.step_plan import StepPlan

VOCABULARY = 97


class Table:
    """Scores that depend on the last token alone."""

    def __init__(self, *, isolates: bool, size: int = VOCABULARY) -> None:
        self.isolates = isolates
        self._scores = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 3

    def run(self, plan: StepPlan) -> torch.Tensor:
        return self._scores[[part.tokens[-1] for part in plan.segments if part.needs_logits]]

    def close(self) -> None:
        pass


def around(limits: ParameterRange) -> list[float]:
    """Return the bounds of a range and their neighbours on both sides."""
    found: list[float] = []
    for bound in (limits.minimum, limits.maximum):
        if isinstance(bound, int):
            found += [bound - 1, bound, bound + 1]
        else:
            found += [math.nextafter(bound, -math.inf), bound, math.nextafter(bound, math.inf)]
    return found


_EVERY = [
    value
    for limits in (*RANGES.values(), LOGIT_BIAS_RANGE, NUM_CHOICES_RANGE, PRIORITY_RANGE)
    for value in around(limits)
]
_ODD = [
    0.0,
    -0.0,
    5e-324,
    1e-310,
    1e-300,
    1e-45,
    1e-38,
    1e-8,
    1e-6,
    3.4e38,
    1e39,
    1.7e308,
    math.inf,
    -math.inf,
    math.nan,
]
FLOATS = st.one_of(st.sampled_from([*_ODD, *map(float, _EVERY)]), st.floats())
INTEGERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 96, 97, 256, 257, 2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**400]),
    st.sampled_from([value for value in _EVERY if isinstance(value, int)]),
    st.integers(),
)
