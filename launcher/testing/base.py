"""What contracts of parts share: the run that chooses the part."""

from __future__ import annotations

from typing import ClassVar

import pytest

import launcher
from launcher.config.run import Run


class PartContract:
    """Checks of a part of runs; a subclass names the overrides that choose it."""

    overrides: ClassVar[tuple[str, ...]] = ()
    """As a command has them: ``("plugins=[mine]", "optimizer=lion")``."""

    @pytest.fixture
    def words(self) -> tuple[str, ...]:
        """Return the overrides; a subclass that needs a file makes it here."""
        return self.overrides

    @pytest.fixture
    def configured(self, words: tuple[str, ...]) -> Run:
        """Return the typed configuration."""
        return launcher.compose(words)
