"""DeepSpeed, imported without mlflow.

Its autotuner, which comes with it and which nothing here uses, imports mlflow where it is installed: seconds of a core.
"""

from __future__ import annotations

import sys

_hides_mlflow = "mlflow" not in sys.modules
if _hides_mlflow:
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # importing it fails, as where it is not installed
try:
    import deepspeed as deepspeed
finally:
    if _hides_mlflow:
        del sys.modules["mlflow"]
