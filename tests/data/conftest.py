"""A small model to open data for, and a cache of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config.data.hf import HfData
from launcher.config.data.text import Text
from launcher.config.model.gpt2 import Gpt2

TEXT = "\n".join(f"Line {i} of the text says that {i} times {i} is {i * i}." for i in range(300))


@pytest.fixture
def model() -> Gpt2:
    """A model whose embedding has room for small vocabularies only."""
    return Gpt2(
        name="small",
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=8,
        max_position_embeddings=64,
        vocab_size=400,
    )


@pytest.fixture
def text(tmp_path: Path) -> Callable[..., Text]:
    """Make a text configuration over files of these contents."""

    def make(*contents: str, **fields: Any) -> Text:
        for number, content in enumerate(contents or (TEXT,)):
            (tmp_path / f"{number}.txt").write_text(content, encoding="utf-8")
        given = {"path": f"{tmp_path}/*.txt", "vocab_size": 300, "cache": str(tmp_path / "cache"), **fields}
        return Text(**given)

    return make


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., HfData]:
    """Make a data-set configuration over local files."""

    def make(path: str, *files: Path, **fields: Any) -> HfData:
        given = {"vocab_size": 300, "cache": str(tmp_path / "cache"), "files": tuple(map(str, files)), **fields}
        return HfData(path=path, **given)

    return make
