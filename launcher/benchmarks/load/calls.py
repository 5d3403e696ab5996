"""What is asked of a server: drawn from a seed, or read from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.benchmarks.load.lengths import Lengths

_COMMON = """
the of and to in is that it was for on are with as his they be at one have this from or had by but some what there we
can out other were all your when up use word how said an each she which do their time if will way about many then them
would write like so these her long make thing see him two has look more day could go come did my sound no most number
who over know water than call first people may down side been now find
"""
WORDS = tuple(_COMMON.split())
"""Common words that are one token each, with the space before them, in the vocabulary of any language model."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request."""

    fields: dict[str, Any]
    """``prompt`` or ``messages``, ``max_tokens``, and whatever else goes into its body."""
    at_s: float = 0.0
    """When it is due, in seconds after the start; only where calls come at given times."""


def drawn_calls(*, seed: int, inputs: Lengths, outputs: Lengths) -> Iterator[Call]:
    """Yield calls without end, the same ones for the same seed.

    Args:
        seed: of everything.
        inputs: words of a prompt, which is about its tokens.
        outputs: ``max_tokens``.
    """
    random_ = random.Random(seed)
    while True:
        prompt = " ".join(random_.choices(WORDS, k=inputs.draw(random_)))
        yield Call({"prompt": prompt, "max_tokens": outputs.draw(random_)})


def read_trace(path: Path) -> list[Call]:
    """Return the calls of a file: JSON lines with the fields of each body and, where there is one, ``at_s``.

    Raises:
        ValueError: a line is no such object; the message names its number.
        OSError: the file cannot be read.
    """
    calls = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                calls.append(_parsed(number, line))
    if not calls:
        raise ValueError("holds no line")
    return calls


def _parsed(number: int, line: str) -> Call:
    try:
        fields = json.loads(line)
        at_s = float(fields.pop("at_s", 0.0))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"line {number} is no call: {error}") from error
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        raise ValueError(f"line {number} needs prompt or messages")
    return Call(fields, at_s)


def arrivals(*, seed: int, rate: float) -> Iterator[float]:
    """Yield the times of a Poisson process: ``rate`` calls a second, gaps exponentially distributed."""
    random_, at_s = random.Random(seed), 0.0
    while True:
        at_s += random_.expovariate(rate)
        yield at_s
