"""Imports without an optional package that would only cost time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden_mlflow() -> Iterator[None]:
    """Let imports of mlflow fail, as where it is not installed, unless it is imported already.

    Around imports of DeepSpeed: its autotuner, which comes with it and which nothing here uses, imports mlflow where it
    is installed, which takes seconds of a core.
    """
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]
