"""Medians as bars, each sample as a dot on them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.benchmarks.units import amount, label

_BAR, _DOT = "#9db8d9", "#1d4ed8"


def draw_bars(picture: Path, cases: Mapping[str, Mapping[str, Sequence[float]]], *, title: str) -> None:
    """Draw one panel a quantity, one bar a case.

    Args:
        picture: the PNG to write.
        cases: samples by quantity, by name of the case; a case that lacks a quantity has no bar there.
        title: above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    names, quantities = list(cases), list(dict.fromkeys(key for samples in cases.values() for key in samples))
    figure = Figure(figsize=(4.5 * len(quantities), 1.6 + 0.6 * len(names)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    for number, quantity in enumerate(quantities):
        axes = figure.add_subplot(1, len(quantities), number + 1)
        for place, name in enumerate(names):
            values = [amount(quantity, value) for value in cases[name].get(quantity, ())]
            if not values:
                continue
            middle = statistics.median(values)
            axes.barh(place, middle, color=_BAR, height=0.6)
            axes.plot(values, [place] * len(values), "o", color=_DOT, markersize=3)
            axes.annotate(
                f"{middle:.3g}", (0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(label(quantity))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)
