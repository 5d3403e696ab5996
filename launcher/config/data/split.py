"""Splits of a data set and their slices, as ``datasets`` writes them (``train[:50%]+test``)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SLICE = re.compile(
    r"(?P<name>\w+(\.\w+)*)"
    r"(?P<slice>\[((?P<first>-?[\d_]+)(?P<first_percent>%)?)?:((?P<stop>-?[\d_]+)(?P<stop_percent>%)?)?\])?"
    r"(\((?P<rounding>closest|pct1_dropremainder)\))?"
)
_MANY_ROWS = 10**15
"""More rows than any data set has."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A range of the rows of one split."""

    name: str
    first: int | None = None
    stop: int | None = None
    is_percent: bool = False
    drops_remainder: bool = False
    """Round percentages down to whole hundredths of the rows, instead of to the nearest row."""

    def rows(self, num_rows: int) -> range:
        """Return the rows it takes of a split with ``num_rows``."""
        first, stop = (None if bound is None else self._bound(bound, num_rows) for bound in (self.first, self.stop))
        return range(num_rows)[first:stop]

    @property
    def is_always_empty(self) -> bool:
        """Return whether it has no row of any split, however long."""
        lengths = (_MANY_ROWS, *(abs(bound) for bound in (self.first, self.stop) if bound))
        return not any(self.rows(length) for length in lengths)

    def _bound(self, bound: int, num_rows: int) -> int:
        if not self.is_percent:
            return bound
        return bound * (num_rows // 100) if self.drops_remainder else round(bound * num_rows / 100)


def parse_split(text: str) -> tuple[Slice, ...] | None:
    """Return the slices that ``text`` adds up; ``None`` where ``datasets`` would not read it."""
    slices = []
    for part in re.split(r"\s*\+\s*", text):
        found = _SLICE.fullmatch(part)
        if found is None:
            return None
        try:
            first, stop = (None if found[name] is None else int(found[name]) for name in ("first", "stop"))
        except ValueError:  # underscores alone
            return None
        is_percent = bool(found["first_percent"] or found["stop_percent"])
        if is_percent and max(abs(first or 0), abs(stop or 0)) > 100:
            return None
        if found["rounding"] and not is_percent:
            return None
        drops = found["rounding"] == "pct1_dropremainder"
        slices.append(Slice(found["name"], first, stop, is_percent=is_percent, drops_remainder=drops))
    return tuple(slices)
