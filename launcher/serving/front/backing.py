"""What a front needs of whatever answers its requests."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator

from starlette.types import ASGIApp


class Backing(ABC):
    """Our engines, or another server behind this one."""

    app: ASGIApp
    """Answers requests."""
    broken: asyncio.Future[None]
    """Gets the exception that makes it impossible to go on."""

    @abstractmethod
    def open(self) -> None:
        """Start what takes time to start; return at once."""

    @abstractmethod
    async def get_ready(self) -> None:
        """Return once requests are answered.

        Raises:
            LauncherError: they never will be.
        """

    @property
    @abstractmethod
    def open_requests(self) -> int:
        """Requests that are not answered to their end."""

    @abstractmethod
    def drain(self) -> None:
        """Take no more."""

    @abstractmethod
    def fail_all(self) -> None:
        """Tell whoever still waits that there is no time left."""

    @abstractmethod
    def reject(self, reason: str) -> None:
        """Count a request that was turned away before it came here."""

    @abstractmethod
    async def close(self) -> None:
        """End everything that was started."""

    @property
    @abstractmethod
    def num_ended(self) -> int:
        """How much has been answered, as metrics.jsonl counts it."""

    @abstractmethod
    def row(self) -> Iterator[tuple[str, float]]:
        """Yield what a line of metrics.jsonl holds."""
