"""Quantities as people read them: the unit is the end of a quantity's name."""

from __future__ import annotations

_UNITS = {"_bytes": ("GB", 1e-9), "_s": ("s", 1.0)}


def label(quantity: str) -> str:
    """Return ``peak (GB)`` for ``peak_bytes``."""
    if quantity.endswith("_per_s"):
        return f"{quantity.removesuffix('_per_s').replace('_', ' ')}/s"
    for ending, (unit, _) in _UNITS.items():
        if quantity.endswith(ending):
            return f"{quantity.removesuffix(ending).replace('_', ' ')} ({unit})"
    return quantity.replace("_", " ")


def amount(quantity: str, value: float) -> float:
    """Return a value in the unit that ``label`` names; a GB is a thousand million bytes."""
    factors = [factor for ending, (_, factor) in _UNITS.items() if quantity.endswith(ending)]
    return value * (factors[0] if factors else 1.0)
