"""How fast something grows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping


def exponent(values: Mapping[int, float]) -> float:
    """Return p of the power law ``value ~ size^p`` that is nearest in least squares, on logarithmic axes.

    Args:
        values: by size, at least two; all above 0.
    """
    sizes, logs = [math.log(size) for size in values], [math.log(value) for value in values.values()]
    return statistics.linear_regression(sizes, logs).slope
