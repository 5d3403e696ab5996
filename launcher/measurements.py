"""What a benchmark left behind, read back from its ``benchmark.json``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.runfiles import read_object

Samples = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """One run of a benchmark."""

    kind: str
    """Which benchmark."""
    options: Mapping[str, Any]
    """What it was told."""
    machine: Mapping[str, str]
    cases: Mapping[str, Mapping[str, Samples]]
    """Values by quantity in the order of rounds, by name of the case."""
    said: tuple[str, ...]
    """Its findings in words."""

    def rows(self) -> list[tuple[str, str, float, float, float, int]]:
        """Return case, quantity, median, least, most and number of values, a row each."""
        return [
            (case, quantity, statistics.median(values), min(values), max(values), len(values))
            for case, quantities in self.cases.items()
            for quantity, values in quantities.items()
        ]


def read_measurements(path: Path) -> Measurements:
    """Return what a ``benchmark.json`` holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not the result of a benchmark; says what is wrong.
    """
    try:
        tree = read_object(path)
        options = dict(tree["benchmark"])
        cases = {
            str(name): {str(key): tuple(map(float, values)) for key, values in quantities.items()}
            for name, quantities in tree["cases"].items()
        }
        found = Measurements(
            kind=str(options.pop("kind")),
            options=options,
            machine={str(key): str(value) for key, value in tree["machine"].items()},
            cases=cases,
            said=tuple(map(str, tree["said"])),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is not what a benchmark writes ({type(error).__name__}: {error})") from error
    if not all(values for quantities in cases.values() for values in quantities.values()):
        raise ValueError("holds a quantity without a value")
    return found
