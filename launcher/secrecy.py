"""Which environment variables hold secrets, by their names."""

from __future__ import annotations

_WORDS = frozenset({"KEY", "APIKEY", "TOKEN", "PASS", "PWD", "AUTH"})
_PARTS = ("SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")


def is_secret_name(name: str) -> bool:
    """Whether a variable of that name holds a secret (``HF_TOKEN``, ``WANDB_API_KEY``), not just a word like it."""
    upper = name.upper()
    return bool(_WORDS.intersection(upper.split("_"))) or any(part in upper for part in _PARTS)
