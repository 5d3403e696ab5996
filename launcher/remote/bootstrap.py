"""How a host is told what to run: a constant command, and everything else over stdin.

A remote command line passes through the login shell of the host, whichever that is, and stands in its process list. So
nothing travels there but the interpreter's path and a line of Python that never changes. It reads the first line of
stdin, a JSON string with the source of ``on_host.py``, and runs it; that reads the second.

    stdin:  "source of on_host.py" ⏎  {"module": …, "cwd": …, …} ⏎  code, if it is sent  what the module reads …
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import ConfigError
from launcher.remote.bundle import Bundle

ONE_LINER = "import json,os;exec(json.loads(bytes(iter(lambda:os.read(0,1)[0],10))))"
"""Reads byte by byte, so that what follows the line is left for others. Holds nothing that sh, bash, csh, fish or zsh
would touch between single quotes, where csh still minds ``!`` and fish the backslash."""

_PLAIN = re.compile(r"(~/)?[A-Za-z0-9_@%+:,./-]+")
_TROUBLESOME = re.compile(r"['\\!\x00-\x1f\x7f]")


def shell_command(python: str) -> str:
    """Return the command that any login shell runs; ``python`` may begin with ``~/``.

    ``-I`` keeps a ``json.py`` in the home directory from being imported instead of the real one.

    Raises:
        ConfigError: a path that cannot be quoted for every shell.
    """
    if _TROUBLESOME.search(python) or python.startswith("-"):
        fix = "use a path without quotes, backslashes and exclamation marks, or a link with such a path"
        raise ConfigError("backend.python", python, why="cannot be written so that every login shell takes it", fix=fix)
    word = python if _PLAIN.fullmatch(python) else f"'{python}'"
    return f"exec {word} -I -c '{ONE_LINER}'"


def prologue(module: str, *, cwd: str, pythonpath: Sequence[str] = (), bundle: Bundle | None = None) -> bytes:
    """Return what stdin begins with, so that the host becomes ``python -m module``.

    Args:
        module: reads the rest of stdin.
        cwd: entered where it exists; where it does not and the code is shared, the host says so and goes on.
        pythonpath: folders on the host that come first in PYTHONPATH.
        bundle: the code, for hosts that do not share it; it comes before ``pythonpath``.
    """
    source = Path(__file__).with_name("on_host.py").read_text(encoding="utf-8")
    sent = None if bundle is None else {"sha256": bundle.sha256, "num_bytes": len(bundle.payload)}
    header = {"module": module, "cwd": cwd, "pythonpath": list(pythonpath), "bundle": sent}
    lines = f"{json.dumps(source)}\n{json.dumps(header)}\n"
    return lines.encode("ascii") + (b"" if bundle is None else bundle.payload)
