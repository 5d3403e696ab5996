"""This machine and this program: free ports, open files, full disks, the code's folder."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import resource
import secrets
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import launcher
from launcher.utils.files import DISK_FULL_ERRNOS
from launcher.utils.text import bytes_text

LOOPBACK = "127.0.0.1"
"""Where the ranks of one machine meet: nothing else reaches it."""
_LEAST_PORT, _USUAL_FIRST_PORT = 10_000, 32_768
_PORT_TRIES = 100


def code_root() -> Path:
    """Return the folder that holds this package: the root of a checkout, or ``site-packages``."""
    return Path(launcher.__file__).resolve().parent.parent


def child_environment() -> dict[str, str]:
    """Return this process's environment for a child that runs ``python -m launcher…``.

    ``python -m`` puts the working directory first in ``sys.path``: a ``random.py`` or ``datasets.py`` there, the user's
    or another user's, would be imported instead of the library. Descendants inherit this.
    """
    environ = {**os.environ, "PYTHONSAFEPATH": "1"}
    if code_root() == Path.cwd():  # a checkout that is not installed is found through the working directory alone
        known = filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))
        environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(code_root()), *known]))
    return environ


def run_in_foreground(command: Sequence[str]) -> int:
    """Run ``python -m launcher…`` in this terminal and return its exit code.

    Ctrl-C reaches the child as well, which decides what it means.
    """
    child = subprocess.Popen(command, env=child_environment())
    while True:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            continue
        return 128 - code if code < 0 else code


def free_port() -> int:
    """Return a port that is free at this moment.

    It is none of those that Linux gives to connections, one of which could take it before a server does, unless other
    programs have all of the others.
    """
    for _ in range(_PORT_TRIES):
        port = _LEAST_PORT + secrets.randbelow(_first_port_of_connections() - _LEAST_PORT)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        any_port: int = probe.getsockname()[1]
        return any_port


def _first_port_of_connections() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):  # not Linux
        return _USUAL_FIRST_PORT
    return first if first > _LEAST_PORT else _USUAL_FIRST_PORT


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on a host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def is_network(text: str) -> bool:
    """Whether ``text`` is an IP address or a network such as ``10.1.0.0/16``."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def raise_open_file_limit(num_files: int) -> Iterator[None]:
    """Let this process open this many more files, if the system allows it."""
    import psutil  # here: the command line must start quickly, and most commands need none of it

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_files + psutil.Process().num_fds()
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        yield
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


_FULL_MESSAGES = re.compile(r"No space left on device|Disk quota exceeded|os error (?:28|122)\b")
"""Errors of libraries that carry no errno: safetensors is Rust."""

_WRITER_MESSAGES = re.compile(
    r"inline_container|PytorchStreamWriter|iostream error|requested and \d+ written|[Ss]hort write"
)
"""Messages of torch's and NumPy's writers that replace "No space left on device"."""

_MIN_FREE_BYTES = 1 << 16
"""Fewer free bytes count as none.
File systems allocate blocks, and the first that does not fit is lost."""
_NAMED = "the disk of "
"""Beginning of messages about a full disk."""


def describe_full_disk(folder: Path) -> str | None:
    """Return a description of the full disk of ``folder``; ``None`` if it has room."""
    try:
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        disk = os.statvfs(there)
    except (OSError, StopIteration):
        return None
    free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    if disk.f_blocks and free < _MIN_FREE_BYTES:
        return f"{_NAMED}{folder} is full ({bytes_text(free)} of {bytes_text(total)} free)"
    if disk.f_files and not disk.f_favail:
        return f"{_NAMED}{folder} is full (0 of {disk.f_files:,} files free)"
    return None


def is_disk_full_error(error: BaseException) -> bool:
    """Return whether an error, or one that it came of, says that a disk is full."""
    return any(
        (isinstance(one, OSError) and one.errno in DISK_FULL_ERRNOS) or _FULL_MESSAGES.search(str(one))
        for one in _exception_chain(error)
    )


def disk_full_message(error: BaseException, folders: Mapping[str, Path]) -> str | None:
    """Return a message naming the full disk that caused ``error``; ``None`` for other causes.

    Args:
        error: what a write raised.
        folders: where the run writes, each by the option that says so (``run.root``). The first that is full counts.
    """
    if _NAMED in str(error):  # with the option that helps
        return str(error)
    is_sure = is_disk_full_error(error)
    if not is_sure and not any(_WRITER_MESSAGES.search(str(one)) for one in _exception_chain(error)):
        return None
    full = {option: words for option, folder in folders.items() if (words := describe_full_disk(folder))}
    if not full and not is_sure:
        return None
    named = next((one.filename for one in _exception_chain(error) if isinstance(one, OSError) and one.filename), None)
    holding = [option for option, folder in folders.items() if named and _holds(folder, Path(str(named)))]
    own = max(holding, key=lambda option: len(folders[option].absolute().parts), default=None)
    option = own or next(iter(full), next(iter(folders)))
    words = full.get(option) or f"{_NAMED}{named or folders[option]} was full, or its quota used up"
    said = " ".join(str(error).split())
    return f"{words}: {type(error).__name__}: {said}. Free some space, or set {option} to a folder on another disk"


def _holds(folder: Path, file: Path) -> bool:
    return file.is_absolute() and file.is_relative_to(folder.absolute())


def _exception_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those it came of."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
