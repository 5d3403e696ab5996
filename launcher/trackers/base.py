"""What a run at a tracker is given, and how a tracker says that it cannot take it.

TrackerError
├── NotSent         the server did not answer: what was logged is kept, and sent later
└── TrackerFailed   the tracker cannot continue
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any


class TrackerError(Exception):
    """Why a tracker did not take something, in one line."""

    def __init__(self, error: object) -> None:
        super().__init__(next(iter(str(error).splitlines()), "") or type(error).__name__)


class NotSent(TrackerError):
    """What was logged could not be sent now."""


class TrackerFailed(TrackerError):
    """Nothing more can be sent."""


class TrackedRun(ABC):
    """A run at a tracker. Methods with a body may be left as they are."""

    keeps_lines = False
    """Whether a later life of the run adds to what this one sent; else each sends everything."""

    @abstractmethod
    def log(self, line: Mapping[str, Any]) -> None:
        """Take one line of metrics.jsonl."""

    @abstractmethod
    def finish(self, exit_code: int) -> None:
        """Close with the run's exit code."""

    def log_samples(self, samples: Sequence[Mapping[str, Any]], *, everything: Sequence[Mapping[str, Any]]) -> None:
        """Take generated texts.

        Args:
            samples: the new lines of samples.jsonl.
            everything: all lines.
        """
        return

    def rewind(self, step: int) -> None:
        """Expect lines of steps after ``step`` again."""
        return

    def flush(self) -> None:
        """Send what was logged.

        Raises:
            NotSent: it is kept, and sent by a later call.
            TrackerFailed: the tracker cannot continue.
        """
        return


class MinimalRun(TrackedRun):
    """A plugin's tracker, which needs ``log`` and ``finish``, and may have ``log_samples``."""

    def __init__(self, plugin: Any) -> None:
        self._plugin = plugin

    def log(self, line: Mapping[str, Any]) -> None:
        """Pass it on."""
        self._plugin.log(line)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], *, everything: Sequence[Mapping[str, Any]]) -> None:
        """Pass the new ones on."""
        if hasattr(self._plugin, "log_samples"):
            self._plugin.log_samples(samples)

    def finish(self, exit_code: int) -> None:
        """Pass it on."""
        self._plugin.finish(exit_code)
