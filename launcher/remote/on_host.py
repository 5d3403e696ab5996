"""First program on a host: put code, folder and PATH in place, then run the module.

``command.py`` sends this file over stdin, so it may use only the standard library. It must parse on a Python that is
too old for the rest, to report that.

After its own source it reads one line of JSON, and as many bytes of code as that line announces. It reads no further:
the remaining bytes belong to the module, which inherits the same stdin.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

_STDIN = 0
_OLDEST = (3, 11)
_CHUNK_BYTES = 1 << 16


def main() -> None:
    """Handle the header on stdin; does not return."""
    if sys.version_info < _OLDEST:
        found = ".".join(str(number) for number in sys.version_info[:3])
        _give_up(f"{sys.executable} is Python {found}, and Python 3.11 or newer is needed")
    header = json.loads(_read_line())
    env = {**os.environ, **header["env"]}
    sources = list(header["pythonpath"])
    if header["bundle"] is None:
        _enter(header["cwd"], needed=True)
    else:
        sources.insert(0, _code(header["bundle"]["sha256"], header["bundle"]["num_bytes"]))
        _enter(header["cwd"], needed=False)
    # otherwise a module of the working directory would be imported instead of a library or of the code that was sent
    env["PYTHONSAFEPATH"] = "1"
    env["PYTHONPATH"] = os.pathsep.join([*sources, *filter(None, [env.get("PYTHONPATH")])])
    # programs installed beside this interpreter (ninja) are found as in an activated environment
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    os.execve(sys.executable, [sys.executable, "-m", header["module"]], env)  # noqa: S606  (no shell is wanted)


def _enter(folder: str, *, needed: bool) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        if needed:
            _say(f"cannot enter {folder}: {error.strerror}; staying in {Path.cwd()}")


def _code(sha256: str, num_bytes: int) -> str:
    """Return the folder with the code from stdin; unpack it unless an earlier run has."""
    packed = b"".join(_read(num_bytes))
    if hashlib.sha256(packed).hexdigest() != sha256:
        _give_up(f"the code arrived damaged: its SHA-256 is not {sha256}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "launcher" / "code" / sha256
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _unpack(packed, folder)
    except (OSError, tarfile.TarError) as error:
        _give_up(f"the code cannot be unpacked into {folder}: {error}")
    return str(folder)


def _unpack(packed: bytes, folder: Path) -> None:
    """Create ``folder`` atomically: several runs may unpack at once, and each may die half-way."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unpacking-"))
    # the filter is missing before 3.11.4; the hash has already proved that the archive is the sender's
    safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    try:
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
            archive.extractall(temporary, **safely)  # noqa: S202
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another run was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += next(_read(1))
    return line


def _read(num_bytes: int) -> Any:
    """Yield exactly ``num_bytes`` of stdin, in pieces."""
    while num_bytes:
        piece = os.read(_STDIN, min(num_bytes, _CHUNK_BYTES))
        if not piece:
            _give_up(f"the connection ended {num_bytes} bytes before everything had arrived")
        num_bytes -= len(piece)
        yield piece


def _say(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr, flush=True)


def _give_up(text: str) -> None:
    _say(text)
    sys.exit(2)


if __name__ == "__main__":
    main()
