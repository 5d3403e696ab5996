"""Names of measured quantities end in their unit: labels, amounts and spreads as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_UNITS = {
    "_gb_per_s": ("GB/s", 1.0),
    "_mb_per_s": ("MB/s", 1.0),
    "_per_s": ("", 1.0),
    "_bytes": ("GB", 1e-9),
    "_mb": ("MB", 1.0),
    "_ms": ("ms", 1.0),
    "_us": ("µs", 1.0),
    "_s": ("s", 1.0),
}
"""Unit and factor by ending of the name.
An ending that contains another one comes before it."""


def label(quantity: str) -> str:
    """Return ``peak (GB)`` for ``peak_bytes``."""
    for ending, (unit, _) in _UNITS.items():
        if quantity.endswith(ending):
            name = quantity.removesuffix(ending).replace("_", " ")
            return f"{name} ({unit})" if unit else f"{name}/s"
    return quantity.replace("_", " ")


def amount(quantity: str, value: float) -> float:
    """Return a value in the unit that ``label`` names; a GB is a thousand million bytes."""
    factors = [factor for ending, (_, factor) in _UNITS.items() if quantity.endswith(ending)]
    return value * (factors[0] if factors else 1.0)


def spread(quantity: str, values: Sequence[float]) -> str:
    """Return the median and the range of a quantity's values in its unit."""
    middle, least, most = (amount(quantity, value) for value in (statistics.median(values), min(values), max(values)))
    return f"{_digits(middle)} ({_digits(least)} to {_digits(most)})"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
