"""What a machine can say against a server before it starts: packages, the port, the keys."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ConfigError
from launcher.serving.api.keys import VARIABLE, variable_problems

if TYPE_CHECKING:
    from launcher.jobs.serve import Serve

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_TRIES = 50


def missing_packages(job: Serve) -> Iterator[ConfigError]:
    """Yield what has to be installed first, in one line."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        why = f"it needs {', '.join(missing)}"
        yield ConfigError("job", job.kind, why=why, fix="pip install 'launcher[serve]'")


def address_problems(job: Serve) -> Iterator[ConfigError]:
    """Yield an address that this machine does not have, or a port that cannot be listened on."""
    trouble = _trouble(job.host, job.port)
    if trouble is None:
        return
    if isinstance(trouble, socket.gaierror) or trouble.errno == 99:  # EADDRNOTAVAIL
        yield job.refuse("host", f"is no address of this machine ({trouble.strerror})", "set job.host=127.0.0.1")
        return
    if isinstance(trouble, PermissionError):
        yield job.refuse("port", "only root may listen there", "set job.port=8000 or another above 1023")
        return
    free = next((port for port in range(job.port + 1, job.port + _TRIES) if _trouble(job.host, port) is None), None)
    fix = f"set job.port={free}, which is free" if free else "set job.port to a free one"
    yield job.refuse("port", f"somebody listens on {job.host}:{job.port} already", fix)


def _trouble(host: str, port: int) -> OSError | None:
    """Return why nobody can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except (OSError, OverflowError, UnicodeError) as error:
        return error if isinstance(error, OSError) else OSError(22, str(error))
    return None


def keys_problems(job: Serve) -> Iterator[ConfigError]:
    """Yield a variable that is set and holds no key, and a file of keys that cannot be read or holds none."""
    yield from variable_problems(os.environ)
    if VARIABLE in os.environ and job.allowed_hosts:
        why = f"clients show keys ({VARIABLE}), so Host headers are not checked"
        yield job.refuse("allowed_hosts", why, f"leave job.allowed_hosts out, or unset {VARIABLE}")
    if job.api_keys_file is None:
        return
    try:
        text = Path(job.api_keys_file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        yield job.refuse("api_keys_file", why, "give a text file with one key a line")
        return
    if not any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()):
        yield job.refuse("api_keys_file", "holds no key", "write one key a line into it")
