"""Draw the panels of a dashboard as one SVG, from what a Prometheus has scraped. These are not Grafana's pictures.

python scripts/bench/draw_panels.py http://localhost:9090 monitoring/chat/grafana/dashboards/serving.json panels.svg
"""

from __future__ import annotations

import argparse
import json
import math
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

_COLUMNS, _WIDTH, _HEIGHT = 3, 320, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 26, 34
_FOOT = 20
_POINTS = 120
_MAX_LEGENDS, _LEGEND = 4, 24
_TITLE = 40
"""Characters of a title in its usual size; a longer one is smaller."""
_COLORS = ("#3274d9", "#e0752d", "#37872d", "#c4162a", "#8f3bb8", "#7a6a00", "#0a8a8a", "#8a8a8a")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series."""

    name: str
    points: Sequence[tuple[float, float]]
    """Time and value."""


def main() -> None:
    """Draw every panel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="address of Prometheus")
    parser.add_argument("board", type=Path, help="dashboard as launch deploy renders it")
    parser.add_argument("out", type=Path, help="SVG to write")
    parser.add_argument("--minutes", type=float, default=5, help="length of the graphs")
    arguments = parser.parse_args()
    board, end = json.loads(arguments.board.read_text(encoding="utf-8")), time.time()
    begin = end - 60 * arguments.minutes
    arguments.out.write_text(drawn(arguments.prometheus, board, begin=begin, end=end), encoding="utf-8")


def drawn(prometheus: str, board: Mapping[str, Any], *, begin: float, end: float) -> str:
    """Return the SVG of all panels of a dashboard over a time."""
    panels = [
        (panel["title"], panel["fieldConfig"]["defaults"]["unit"], list(lines_of(prometheus, panel, begin, end)))
        for panel in board["panels"]
    ]
    return draw(panels, begin=begin, end=end)


def lines_of(prometheus: str, panel: Mapping[str, Any], begin: float, end: float) -> Iterator[Line]:
    """Yield the series of a panel, of all servers or runs."""
    for target in panel["targets"]:
        expr = target["expr"].replace("$__rate_interval", "15s")
        for variable in ("$job", "$run_name", "$run_id"):
            expr = expr.replace(variable, ".*")
        words = {"query": expr, "start": begin, "end": end, "step": (end - begin) / _POINTS}
        address = f"{prometheus.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(words)}"
        with urllib.request.urlopen(address, timeout=60) as answer:  # noqa: S310 (the user's own Prometheus)
            found = json.load(answer)["data"]["result"]
        for series in found:
            name = target["legendFormat"]
            for label, value in series["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            points = [(float(at), float(value)) for at, value in series["values"]]
            yield Line(name=name, points=[point for point in points if math.isfinite(point[1])])


def draw(panels: Sequence[tuple[str, str, Sequence[Line]]], *, begin: float, end: float) -> str:
    """Return the SVG of panels, each with its title, unit and series."""
    height = -(-len(panels) // _COLUMNS) * _HEIGHT + _FOOT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_COLUMNS * _WIDTH} {height}" font-family="sans-serif">'
    )
    first, last = (datetime.fromtimestamp(at, UTC) for at in (begin, end))
    foot = f"From {first:%Y-%m-%d %H:%M:%S} to {last:%H:%M:%S} UTC. Drawn by draw_panels.py, not by Grafana."
    note = f'<text x="{_LEFT}" y="{height - 6}" font-size="10">{foot}</text>'
    cells = []
    for number, (title, unit, lines) in enumerate(panels):
        place = f"translate({number % _COLUMNS * _WIDTH} {number // _COLUMNS * _HEIGHT})"
        inner = "\n".join(_panel(title, unit, lines, begin, end))
        cells.append(f'<g transform="{place}">\n{inner}\n</g>')
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *cells, note, "</svg>", ""])


def _panel(title: str, unit: str, lines: Sequence[Line], begin: float, end: float) -> Iterator[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    if len(lines) > _MAX_LEGENDS:  # the largest have legends
        lines = sorted(lines, key=lambda line: -max((value for _, value in line.points), default=0.0))
    values = [value for line in lines for _, value in line.points]
    low, high = min([0.0, *values]), max(values, default=1.0)
    if high <= low:
        high = low + 1
    size = 11 * min(1.0, _TITLE / len(title))
    yield f'<text x="{_LEFT}" y="16" font-size="{size:.3g}" font-weight="bold">{escape(title)}</text>'
    yield f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#999" stroke-width="0.7"/>'
    for value, y in ((high, _TOP + 8), (low, bottom)):
        yield f'<text x="{_LEFT - 4}" y="{y}" font-size="9" text-anchor="end">{shown(value, unit)}</text>'
    for number, (line, name) in enumerate(zip(lines, legends([line.name for line in lines]), strict=True)):
        color = _COLORS[number % len(_COLORS)]
        points = " ".join(
            f"{_LEFT + (right - _LEFT) * (at - begin) / (end - begin):.1f},"
            f"{bottom - (bottom - _TOP) * (value - low) / (high - low):.1f}"
            for at, value in line.points
        )
        yield f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.2"/>'
        if number < _MAX_LEGENDS:
            x, y = _LEFT + number % 2 * 132, bottom + 12 + number // 2 * 12
            yield f'<text x="{x}" y="{y}" font-size="9" fill="{color}">{escape(name[-_LEGEND:])}</text>'
    if not values:
        yield f'<text x="{_LEFT + 8}" y="{bottom - 8}" font-size="10">no data</text>'


def legends(names: Sequence[str]) -> list[str]:
    """Return names without the first word, where all have the same one and more words."""
    cut = [name.partition(" ") for name in names]
    is_shared = len({first for first, _, _ in cut}) == 1 and all(rest for _, _, rest in cut)
    return [rest for _, _, rest in cut] if is_shared else list(names)


def shown(value: float, unit: str) -> str:
    """Return a value with its unit."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "bytes":
        return f"{value / 2**20:.4g} MiB"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}{ {'s': ' s', 'reqps': '/s'}.get(unit, '') }"


if __name__ == "__main__":
    main()
