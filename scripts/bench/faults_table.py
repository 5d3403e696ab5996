"""The fault matrix as Markdown."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from faults_cells import DISASTERS, LAUNCHERS, SIGNALS, TARGETS, VARIANTS, Cell, matrix
from faults_trial import GIVE_UP_S, SURVIVORS_AFTER_S

LEGEND = (
    f"A cell shows the number of processes left after {SURVIVORS_AFTER_S:.0f} s, and the seconds until all were gone "
    "on every host. It is the worse of two runs: one with ranks that ignore SIGTERM, one with ranks that have a child. "
    "The letters mean:\n\n"
    "- C: the exit code does not show how the run ended; 0: it is 0 although the run failed;\n"
    "- H: the launcher never ended;\n"
    "- N: no cause is named, or a wrong one;\n"
    "- !: the second run on the same hosts was disturbed;\n"
    "- ✓: none of these, and no process was left;\n"
    "- goes on: the ranks ignore this signal."
)
_RANK = re.compile(r"^\d+ \S*python\S* -u \S*faults_rank\.py")
"""What launchers start with the program in their arguments is no rank."""


def table(cells: Mapping[str, dict[str, Any]]) -> str:
    """Return all launchers' matrices and what they come to."""
    known = [launcher for launcher in LAUNCHERS if any(name.startswith(f"{launcher},") for name in cells)]
    parts = [_summary(known, cells), LEGEND]
    for launcher in known:
        parts.append(f"**{launcher}**")
        parts.append(_matrix(launcher, cells, targets=TARGETS, columns=SIGNALS))
        parts.append(_matrix(launcher, cells, targets=("host",), columns=DISASTERS))
    return "\n\n".join(parts)


def _matrix(
    launcher: str, cells: Mapping[str, dict[str, Any]], *, targets: Sequence[str], columns: Sequence[str]
) -> str:
    rows = [["to", "hosts", *columns]]
    for target in targets:
        for num_hosts in (1, 2, 3) if target != "host" else (2, 3):
            row = [target, str(num_hosts)]
            for how in columns:
                both = [
                    Cell(launcher=launcher, num_hosts=num_hosts, target=target, how=how, variant=variant)
                    for variant in VARIANTS
                ]
                row.append(_text(both, cells))
            rows.append(row)
    return _markdown(rows)


def _text(both: Sequence[Cell], cells: Mapping[str, dict[str, Any]]) -> str:
    if not both[0].exists:
        return "n/a"
    found = [(cell, cells[cell.name]) for cell in both if cell.name in cells]
    if not found:
        return ""
    if any("trouble" in entry for _, entry in found):
        return "did not start"
    wrong = "".join(sorted({letter for cell, entry in found for letter in _wrongs(cell, entry)}))
    ended = [entry for cell, entry in found if not cell.goes_on]
    if not ended:
        return f"goes on {wrong or '✓'}"
    left = max(len(entry["survivors"]) for entry in ended)
    return f"{left}, {_seconds(max(map(_gone, ended)))} {wrong or ('' if left else '✓')}".rstrip()


def _wrongs(cell: Cell, entry: dict[str, Any]) -> Iterator[str]:
    if not entry["is_right_code"]:
        yield {None: "H", 0: "0"}.get(entry["exit_code"], "C")
    if not entry["is_right_cause"]:
        yield "N"
    if entry["neighbour"]:
        yield "!"


def _gone(entry: dict[str, Any]) -> float:
    """Return the seconds until all was gone, for comparisons."""
    return math.inf if entry["gone_s"] is None else float(entry["gone_s"])


def _median(times: Sequence[float]) -> float:
    return statistics.median_high(times) if times else math.inf


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < math.inf else f"> {GIVE_UP_S:.0f} s"


def _summary(launchers: Sequence[str], cells: Mapping[str, dict[str, Any]]) -> str:
    header = ["", "cells", "with survivors", "of these ranks", "wrong exit code", "of these 0", "launcher never ends"]
    times_of = ("all gone, median", "worst", "median where ranks had no child")
    rows = [[*header, "wrong or no cause", "neighbour disturbed", *times_of]]
    for launcher in launchers:
        found = [(cell, cells[cell.name]) for cell in matrix() if cell.launcher == launcher and cell.name in cells]
        found = [(cell, entry) for cell, entry in found if "trouble" not in entry]
        if not found:
            continue
        entries = [entry for _, entry in found]
        times = [_gone(entry) for cell, entry in found if not cell.goes_on]
        codes = [entry["exit_code"] for entry in entries if not entry["is_right_code"]]
        numbers = [
            len(entries),
            sum(bool(entry["survivors"]) for entry in entries),
            sum(any(map(_RANK.search, entry["survivors"])) for entry in entries),
            len(codes),
            codes.count(0),
            codes.count(None),
            sum(not entry["is_right_cause"] for entry in entries),
            sum(bool(entry["neighbour"]) for entry in entries),
        ]
        alone = [_gone(entry) for cell, entry in found if not cell.goes_on and cell.variant == "ignores TERM"]
        shown = [_median(times), max(times, default=math.inf), _median(alone)]
        rows.append([launcher, *map(str, numbers), *map(_seconds, shown)])
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
