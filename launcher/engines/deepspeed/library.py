"""DeepSpeed, imported without mlflow."""

from __future__ import annotations

from launcher.utils.hidden_modules import hidden_mlflow

with hidden_mlflow():
    import deepspeed as deepspeed
