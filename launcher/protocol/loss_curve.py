"""The picture of a run's losses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.protocol.results import read_metrics

_TRAIN, _HELD_OUT, _GREY = "#9db8d9", "#c2410c", "#6b7280"
_SMOOTHING = 0.1
"""Share of the steps that the smoothed line averages over, at most."""


def draw_curve(metrics: Path, picture: Path, *, baselines: Mapping[str, float]) -> None:
    """Draw the losses of a ``metrics.jsonl`` over the steps, with constant baselines.

    Args:
        metrics: the file to read; lines without a loss and losses that were not finite are left out.
        picture: the PNG to write.
        baselines: name to loss in nats a token (``{"uniform": 8.3}``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    trained, held_out = (_points(metrics, name) for name in ("train/loss", "eval/loss"))
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, loss in baselines.items():
        axes.axhline(loss, color=_GREY, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
        label = f"{name} {loss:.2f}"
        axes.annotate(
            label,
            (1, loss),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=_GREY,
            fontsize=8,
        )
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color=_TRAIN, linewidth=1, label="training, each step")
        smooth = _running_mean(losses, window=max(1, round(len(losses) * _SMOOTHING)))
        axes.plot(steps, smooth, color="#1d4ed8", linewidth=1.8, label=f"training, smoothed ({smooth[-1]:.3f})")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(
            steps, losses, "o-", color=_HELD_OUT, markersize=4, linewidth=1.5, label=f"held out ({losses[-1]:.3f})"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross entropy, nats a token")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if trained or held_out:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(picture)


def _points(metrics: Path, name: str) -> list[tuple[int, float]]:
    lines = read_metrics(metrics)
    return [(line["train/step"], line[name]) for line in lines if line.get(name) is not None]


def _running_mean(values: Sequence[float], *, window: int) -> list[float]:
    """Return the mean of the values at most half a ``window`` away from each one."""
    sums, half = [0.0, *itertools.accumulate(values)], window // 2
    ends = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]
