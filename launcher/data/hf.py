"""Data sets of the Hugging Face hub, or local files that ``datasets`` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from launcher.data.base import Corpus


@dataclass(frozen=True, kw_only=True)
class HfData(Corpus):
    """Anything ``datasets.load_dataset`` opens."""

    kind: ClassVar[str] = "hf"

    path: str
    """A hub name (``wikitext``), a local folder, or a format name (``json``, ``csv``, ``parquet``) with ``files``."""

    name: str | None = None
    """The configuration of the data set, where it has several."""

    split: str = "train"
    """The split to read."""

    column: str = "text"
    """The column that holds the text."""

    files: tuple[str, ...] = ()
    """Local files, when ``path`` is a format name."""
