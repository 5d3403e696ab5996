"""How probe and doctor talk: a JSON object a line, told apart from whatever else a login shell prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, is_dataclass
from typing import Any

from launcher.supervise.messages import require_fields

_BEGINNING = b'{"doctor": '
_FIELDS: dict[str, dict[str, Any]] = {
    "hello": {},
    "survey": {},
    "listen": {"port": int | None, "problem": str | None},
    "contact": {"contact": dict[str, Any]},
    "hush": {},
    "pair": {"pair": dict[str, Any]},
    "everyone": {"everyone": dict[str, Any]},
    "collective": {"exit_code": int},
}
"""What a message of each kind must hold; the values inside are read by type where they are used."""


def say(kind: str, **values: Any) -> None:
    """Print one message to the doctor; two processes of a host share this stdout, so it goes out in one piece."""
    tree = {key: asdict(value) if is_dataclass(value) else value for key, value in values.items()}  # type: ignore[arg-type]
    sys.stdout.write(json.dumps({"doctor": kind, **tree}) + "\n")
    sys.stdout.flush()


def heard(line: bytes) -> dict[str, Any] | None:
    """Return the message that a line of a host's stdout holds; ``None`` when it holds none."""
    if not line.startswith(_BEGINNING):
        return None
    try:
        message = json.loads(line)
        kind = message["doctor"] if isinstance(message, dict) else None
        fields = _FIELDS.get(kind) if isinstance(kind, str) else None
        if fields is None:
            return None
        require_fields(message, fields)
    except (ValueError, RecursionError):
        return None
    return dict(message)
