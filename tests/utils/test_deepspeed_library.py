"""DeepSpeed is imported without mlflow, which stays importable."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

AUTOTUNER = """
try:
    import mlflow
    has_mlflow = True
except Exception:
    has_mlflow = False
"""


@pytest.mark.parametrize("is_loaded", [False, True])
def test_mlflow_is_hidden_only_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_loaded: bool) -> None:
    for name, text in {"deepspeed": AUTOTUNER, "mlflow": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    for name in ("deepspeed", "mlflow", "launcher.utils.deepspeed_library"):
        monkeypatch.setitem(sys.modules, name, sys)  # so that it is as it was in the end
        del sys.modules[name]
    monkeypatch.setattr(importlib.import_module("launcher.utils"), "deepspeed_library", None, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    if is_loaded:
        importlib.import_module("mlflow")
    library = importlib.import_module("launcher.utils.deepspeed_library")
    assert library.deepspeed.__file__ == str(tmp_path / "deepspeed" / "__init__.py")
    assert library.deepspeed.has_mlflow is is_loaded
    assert importlib.import_module("mlflow").__file__ == str(tmp_path / "mlflow" / "__init__.py")
