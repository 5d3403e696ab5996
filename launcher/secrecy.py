"""Which environment variables hold secrets."""

from __future__ import annotations

import re

_WORDS = frozenset({"KEY", "KEYS", "APIKEY", "TOKEN", "PASS", "PWD", "AUTH"})
_PARTS = ("SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
_LOGIN_IN_URL = re.compile(r"://[^/\s]*:[^/\s]*@")


def is_secret_name(name: str) -> bool:
    """Whether a variable of that name holds a secret (``HF_TOKEN``, ``WANDB_API_KEY``), not just a word like it."""
    upper = name.upper()
    if upper == "PWD":  # the shell's: the current folder
        return False
    return bool(_WORDS.intersection(upper.split("_"))) or any(part in upper for part in _PARTS)


def is_secret(name: str, value: str) -> bool:
    """Whether a variable holds a secret, by its name or because its value is an address with a password in it."""
    return is_secret_name(name) or _LOGIN_IN_URL.search(value) is not None
