"""DeepSpeed, imported without mlflow.

Its autotuner, which nothing here uses, imports mlflow where it is installed; that takes seconds of a core. Import this
module before any module of DeepSpeed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _hidden_mlflow() -> Iterator[None]:
    """Let imports of mlflow fail, as where it is not installed, unless it is imported already."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


with _hidden_mlflow():
    import deepspeed as deepspeed
