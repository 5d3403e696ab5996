"""Return freed memory from the C library's heap to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of malloc.h: mallopt(3)."""


def trim_heap() -> None:
    """Return freed memory to the system, so that it is not counted as used.

    glibc keeps freed blocks of up to 32 MiB, which the layers of a model are made of, for later use. Where the C
    library has no such call, nothing is done.
    """
    _trim()(0)


def mmap_large_allocations() -> None:
    """From now on, return tensors of 1 MiB and more to the system when they are freed.

    glibc raises that limit when large blocks are freed, and from then on keeps them: fixed, a high-water mark
    follows the tensors that live. Where the C library has no such call, nothing is done.
    """
    set_option: Callable[[int, int], int] = getattr(ctypes.CDLL(None), "mallopt", lambda name, value: 0)
    set_option(_MMAP_THRESHOLD, 2**20)


@functools.cache
def _trim() -> Callable[[int], int]:
    library = ctypes.CDLL(None)
    found: Callable[[int], int] = getattr(library, "malloc_trim", lambda _: 0)
    return found
