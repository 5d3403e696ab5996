"""How probe and doctor talk: a JSON object a line, told apart from whatever else a login shell prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, is_dataclass
from typing import Any

_BEGINNING = b'{"doctor": '


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
        message: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return message
