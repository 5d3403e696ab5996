"""Values that sampling goes wrong with: subnormal, huge, at each boundary and beside it, and no numbers at all."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from launcher.serving.ranges import BIAS, CHOICES, PRIORITY, RANGES, Range


def around(limits: Range) -> list[float]:
    """Return the bounds of a range and their neighbours on both sides."""
    found: list[float] = []
    for bound in (limits.least, limits.most):
        if isinstance(bound, int):
            found += [bound - 1, bound, bound + 1]
        else:
            found += [math.nextafter(bound, -math.inf), bound, math.nextafter(bound, math.inf)]
    return found


_EVERY = [value for limits in (*RANGES.values(), BIAS, CHOICES, PRIORITY) for value in around(limits)]
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
