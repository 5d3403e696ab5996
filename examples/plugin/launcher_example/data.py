"""The corpus of counting on a rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.config.data.base import TextChunk
    from launcher_example.options import Counting


def read_counting(data: Counting) -> Iterator[TextChunk]:
    """Yield the text."""
    return data.local_pieces()
