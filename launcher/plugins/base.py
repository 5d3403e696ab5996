"""What a user's package says of itself: names of its options, of what executes them, and of its YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CALLBACK, LOSS = "callback", "loss"
"""Kinds that are no config group: ``job.callbacks`` and ``job.loss`` name them."""

EXECUTED = ("job", "model", "data", "optimizer", "benchmark", "tracker", "backend")
"""Config groups whose kinds need an executor."""

PLAIN = ("schedule",)
"""Config groups whose dataclass does everything itself."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """What a module adds. It stands in the module as ``plugin``, and importing the module imports no torch."""

    name: str
    """Shown as the origin of what it adds."""

    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Config dataclasses, ``module:Class``, by group and kind: ``{"optimizer": {"lion": "mine.options:Lion"}}``."""

    executors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What executes these on a rank, ``module:name``, by group and kind; also the groups ``callback`` and ``loss``,
    which have no dataclass."""

    conf: str | None = None
    """Folder of YAML beside the module, with a folder for each group as in the launcher's ``conf/``."""
