"""Commands as text that can be pasted into a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from launcher.protocol.plan import Command

_WIDTH = 100


def shell_lines(command: Command) -> list[str]:
    """Return the lines of one shell command: its variables, then its argv, joined by backslashes."""
    words = [f"{name}={shlex.quote(value)}" for name, value in command.env.items()]
    lines = _wrap(words) + _wrap(_with_flags([shlex.quote(word) for word in command.argv]))
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _with_flags(words: Sequence[str]) -> list[str]:
    """Return ``words`` with every flag and its value in one piece, so that no line ends between them."""
    pieces: list[str] = []
    for word in words:
        if pieces and pieces[-1].startswith("-") and " " not in pieces[-1] and not word.startswith("-"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    return pieces


def _wrap(words: Sequence[str]) -> list[str]:
    """Return ``words`` in lines of about _WIDTH characters, the second and later ones indented."""
    lines: list[list[str]] = []
    room = 0
    for word in words:
        room -= len(word) + 1
        if not lines or room < 0:
            lines.append([])
            room = _WIDTH - len(word)
        lines[-1].append(word)
    return [("" if number == 0 else "    ") + " ".join(line) for number, line in enumerate(lines)]
