"""Which values of sampling mean something."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launcher.serving.values import Sampling

_TINY = math.ulp(0.0)
_RANGES: dict[str, tuple[float, float, float]] = {
    "max_tokens": (1, math.inf, 128),
    "min_tokens": (0, math.inf, 0),
    "temperature": (0, math.inf, 0),
    "top_k": (0, math.inf, 0),
    "top_p": (_TINY, 1, 1),
    "min_p": (0, 1, 0),
    "repetition_penalty": (_TINY, math.inf, 1),
    "no_repeat_ngram": (0, math.inf, 0),
    "seed": (0, 2**63 - 1, 0),
    "logprobs": (0, math.inf, 0),
    "beams": (1, math.inf, 1),
}
"""Least, most, and one that always works."""


def out_of_range(sampling: Sampling) -> Iterator[tuple[str, str, float]]:
    """Yield each field that is out of its range, with what is wrong and a value that works."""
    for name, (least, most, usual) in _RANGES.items():
        value = getattr(sampling, name)
        if value is None or least <= value <= most:
            continue
        if value > most:
            yield name, f"must be at most {most:g}", usual
        else:
            yield name, "must be above 0" if least == _TINY else f"must be at least {least:g}", usual
