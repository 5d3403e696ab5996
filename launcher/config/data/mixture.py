"""Shares of the sources of a mixture, exact at every length, and their names in metrics."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Sequence
from fractions import Fraction

from launcher.errors import ConfigError

LONGEST_PATTERN = 100_000
"""Most positions after which a mixture repeats its pattern of sources."""


def exact_weights(weights: Sequence[float]) -> list[Fraction]:
    """Return weights as the fractions that they are written as: 0.1 is a tenth."""
    return [Fraction(repr(float(weight))) for weight in weights]


def weights_error(option: str, weights: Sequence[float]) -> ConfigError | None:
    """Return why weights make no mixture; ``None`` if they do."""
    shown = f"[{','.join(f'{weight:g}' for weight in weights)}]"
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        return ConfigError(option, shown, why="a weight must be 0 or more", fix="give each source a share, such as 0.7")
    if not sum(weights):
        return ConfigError(option, shown, why="the weights sum to 0: no source is left", fix="give one more than 0")
    if (period := _period(exact_weights(weights))) > LONGEST_PATTERN:
        why = f"shares this precise come out even only every {period:,} sequences (at most {LONGEST_PATTERN:,})"
        return ConfigError(option, shown, why=why, fix="round the weights to three digits")
    return None


def mixture_pattern(weights: Sequence[Fraction]) -> list[int]:
    """Return the source at each position of a mixture, which repeats this pattern without end.

    After any number of positions each source has had its share of them, within one. The k-th sequence of a source of
    share w is due between positions floor((k - 1) / w) and ceil(k / w); taking the one that is due first meets all
    (Steiner and Yeomans, 1993).

    Args:
        weights: of each source; only their ratios matter. Not all are 0.
    """
    total, period = sum(weights), _period(weights)
    shares = [weight / total for weight in weights]
    released: list[tuple[int, int]] = [(0, source) for source, share in enumerate(shares) if share]
    waiting: list[tuple[int, int]] = []
    drawn = [0] * len(weights)
    pattern = []
    for position in range(period):
        while released and released[0][0] <= position:
            source = heapq.heappop(released)[1]
            heapq.heappush(waiting, (math.ceil((drawn[source] + 1) / shares[source]), source))
        source = heapq.heappop(waiting)[1]
        pattern.append(source)
        drawn[source] += 1
        heapq.heappush(released, (math.floor(drawn[source] / shares[source]), source))
    return pattern


def _period(weights: Sequence[Fraction]) -> int:
    total = sum(weights)
    return math.lcm(*((weight / total).denominator for weight in weights))


_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")


def source_names(entries: Sequence[str]) -> tuple[str, ...]:
    """Return a name for each entry of ``data.path``, to stand in the names of metrics.

    It is the last part of the path, URL or name on the hub, with as many parts before it as tell the entries apart, and
    ``_`` for characters that not every tracker takes. Entries that are alike even so are numbered.
    """
    parts = [_parts(entry) for entry in entries]
    names = [""] * len(entries)
    for size in range(1, max(map(len, parts), default=0) + 1):
        shown = [_metric_name("/".join(each[-size:])) for each in parts]
        for number, one in enumerate(shown):
            if not names[number] and shown.count(one) == 1 and one not in names:
                names[number] = one
    for number, each in enumerate(parts):
        place = number + 1
        while not names[number]:
            one = f"{_metric_name(each[-1])}-{place}"
            names[number] = "" if one in names else one
            place += len(parts)
    return tuple(names)


def _parts(entry: str) -> list[str]:
    """Return the parts of a path or a URL, without what may be secret.

    A pattern belongs to the part before it.
    """
    if "://" in entry:
        entry = entry.partition("?")[0]
    found: list[str] = []
    for part in entry.split("/"):
        if part in ("", ".", "..", "~"):
            continue
        if found and set(part) & set("*?["):
            found[-1] += f"/{part}"
        else:
            found.append(part.rpartition("@")[2] if "://" in entry else part)
    return found or [entry]


def _metric_name(text: str) -> str:
    return _NOT_IN_NAMES.sub("_", text).strip("_.-") or "source"
