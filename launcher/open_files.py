"""Talking to a thousand hosts at once takes more open files than a process usually may have."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def room_for_files(num_files: int) -> Iterator[None]:
    """Let this process open that many files beside those it has open, where the system allows it."""
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
