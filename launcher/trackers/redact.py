"""Keeping secrets out of what is sent away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.secrecy import is_secret_name

_SHORTEST = 8
"""Shorter values of such variables (``true``, ``0``) are no secrets, and occur by accident."""

HIDDEN = "********"


def redact(tree: Any, environ: Mapping[str, str]) -> Any:
    """Return ``tree`` with each value of a secret environment variable replaced wherever it occurs in text.

    A variable is secret by its name (``HF_TOKEN``, ``WANDB_API_KEY``).
    """
    secrets = [value for name, value in environ.items() if is_secret_name(name) and len(value) >= _SHORTEST]
    return _replace(tree, sorted(secrets, key=len, reverse=True))


def _replace(tree: Any, secrets: list[str]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _replace(value, secrets) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_replace(value, secrets) for value in tree]
    if isinstance(tree, str):
        for secret in secrets:
            tree = tree.replace(secret, HIDDEN)
    return tree
