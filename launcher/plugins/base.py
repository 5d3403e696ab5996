"""The names in a user's package: its options, what executes them, and its YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CALLBACK, LOSS = "callback", "loss"
"""Kinds that are no config group: ``job.callbacks`` and ``job.loss`` name them."""

CROSS_ENTROPY = "cross_entropy"
"""The launcher's own loss."""

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

    The groups ``callback`` and ``loss`` stand here only: they have no dataclass."""

    conf: str | None = None
    """Folder of YAML beside the module, laid out like the launcher's ``conf/``."""
