"""What a script's process and the starter of its runs write to each other."""

from __future__ import annotations

import json
import os
from typing import Any

from launcher.errors import EXIT_UNFIT, ConfigError, ConfigErrors, EnvironmentProblem, LauncherError, Unfit
from launcher.errors.secrets import redact

ANSWER = "\x1elauncher "
"""Prefix of the starter's lines that are for the script's process, not for its user."""


def print_answer(values: dict[str, Any]) -> None:
    """Send values to the process of the script."""
    print(f"{ANSWER}{json.dumps(values)}", flush=True)


def parse_answer(line: str) -> dict[str, Any] | None:
    """Return the values of a line that :func:`print_answer` wrote; ``None`` for other output."""
    if not line.startswith(ANSWER):
        return None
    values: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
    return values


def error_to_tree(error: LauncherError) -> dict[str, Any]:
    """Return an error as plain data, without the secrets of the environment."""
    if isinstance(error, ConfigError):
        return {"mistakes": [_mistake(each) for each in getattr(error, "errors", (error,))]}
    return {"message": redact(str(error), os.environ), "exit_code": error.exit_code}


def error_from_tree(tree: dict[str, Any]) -> LauncherError:
    """Return the error that :func:`error_to_tree` described."""
    if "mistakes" in tree:
        return ConfigErrors([ConfigError(**mistake) for mistake in tree["mistakes"]])
    kind = Unfit if tree["exit_code"] == EXIT_UNFIT else EnvironmentProblem
    return kind(tree["message"])


def _mistake(error: ConfigError) -> dict[str, Any]:
    is_plain = error.value is None or isinstance(error.value, bool | int | float)
    value = error.value if is_plain else redact(str(error.value), os.environ)
    texts = {"option": error.option, "why": error.why, "fix": error.fix}
    return {name: redact(text, os.environ) for name, text in texts.items()} | {"value": value, "source": error.source}
