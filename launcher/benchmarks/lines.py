"""Medians along a size as lines, their range as bars, both axes logarithmic: a power of the size is straight."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.benchmarks.units import amount, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from launcher.benchmarks.sweep import Line, Sweep

_MARKERS = "osv^DXP*"
"""Lines that lie on each other are told apart by them."""


def draw_lines(picture: Path, sweeps: Sequence[Sweep], *, title: str) -> None:
    """Draw one row of panels a sweep, one panel a quantity, one line a case.

    Args:
        picture: the PNG to write.
        sweeps: each with the same quantities.
        title: above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    quantities = sweeps[0].quantities
    figure = Figure(figsize=(5 * len(quantities), 0.6 + 3.6 * len(sweeps)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    panels = figure.subplots(len(sweeps), len(quantities), squeeze=False)
    for sweep, row in zip(sweeps, panels, strict=True):
        for quantity, axes in zip(quantities, row, strict=True):
            for number, (name, line) in enumerate(sweep.lines.items()):
                _draw(axes, line, quantity, name=name, style=f"-{_MARKERS[number % len(_MARKERS)]}")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(sweep.sizes, [f"{size:,}" for size in sweep.sizes], rotation=45, fontsize=7)
            axes.set_xticks([], minor=True)
            axes.set_xlabel(sweep.along)
            axes.set_ylabel(label(quantity))
            axes.set_title(sweep.title, fontsize=9)
            axes.grid(visible=True, alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(picture)


def _draw(axes: Axes, line: Line, quantity: str, *, name: str, style: str) -> None:
    sizes = sorted(line)
    values = [[amount(quantity, value) for value in line[size][quantity]] for size in sizes]
    middles = [statistics.median(taken) for taken in values]
    below = [middle - min(taken) for middle, taken in zip(middles, values, strict=True)]
    above = [max(taken) - middle for middle, taken in zip(middles, values, strict=True)]
    axes.errorbar(sizes, middles, yerr=(below, above), fmt=style, label=name, markersize=4, linewidth=1, capsize=2)
