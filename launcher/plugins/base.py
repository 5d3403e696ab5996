"""The names in a user's package: its options, what executes them, and its YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

CALLBACK, LOSS, METRIC, TRANSFORM = "callback", "loss", "metric", "transform"

NAMED: dict[str, str] = {CALLBACK: "callbacks", LOSS: "loss", METRIC: "metrics", TRANSFORM: "transforms"}
"""Groups of ``executors`` that are no config group, each with the field of a job for it."""

CROSS_ENTROPY = "cross_entropy"
"""The launcher's own loss."""

OWN_METRICS = ("loss", "perplexity", "tokens")
"""Metrics of the launcher's own evaluations."""

EXECUTED = ("job", "model", "data", "optimizer", "benchmark", "tracker", "backend")
"""Config groups whose kinds need an executor."""

PLAIN = ("schedule",)
"""Config groups whose dataclass does everything itself."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """What a module adds: the module's variable ``plugin``. Importing it imports no torch."""

    name: str
    """Shown as the origin of what it adds."""

    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Config dataclasses, ``module:Class``, by group and kind.

    Example: ``{"optimizer": {"lion": "mine.options:Lion"}}``."""

    executors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What executes these, ``module:name``, by group and kind.

    The groups ``callback``, ``loss``, ``metric`` and ``transform`` stand here only: they have no dataclass."""

    callback_metrics: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of the metrics that a callback records, by callback; optional.

    The plan then rejects two callbacks that record one name, and a rank a name that is not declared."""

    conf: str | None = None
    """Folder of YAML beside the module, laid out like the launcher's ``conf/``."""
