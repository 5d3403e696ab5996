"""The C library's heap: what was freed is not always given back."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Give memory that was freed back to the system, so that it does not count while more is asked for.

    glibc keeps freed blocks of up to 32 MiB, which the layers of a model are made of, for later use. Where the C
    library has no such call, nothing is done.
    """
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], int]:
    library = ctypes.CDLL(None)
    found: Callable[[int], int] = getattr(library, "malloc_trim", lambda _: 0)
    return found
