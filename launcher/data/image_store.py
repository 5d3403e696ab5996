"""What a cache keeps of images: their arrays as bytes, and the state of their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launcher.config.data.images import image_hash


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageStamp:
    """What a file of an image was like when it was read."""

    path: str
    num_bytes: int
    modified_ns: int
    sha256: str

    def is_current(self) -> bool:
        """Return whether the file holds the same image; it is read only if its time differs."""
        try:
            status = Path(self.path).stat()
            if (status.st_size, status.st_mtime_ns) == (self.num_bytes, self.modified_ns):
                return True
            return status.st_size == self.num_bytes and image_hash(Path(self.path).read_bytes()) == self.sha256
        except OSError:
            return False


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return arrays as bytes, for :func:`unpack_arrays`: a line of JSON, then their contents."""
    head = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
    return (
        json.dumps(head).encode() + b"\n" + b"".join(np.ascontiguousarray(each).tobytes() for each in arrays.values())
    )


def unpack_arrays(packed: Any) -> dict[str, np.ndarray]:
    """Return the arrays of :func:`pack_arrays`, which may share memory with it."""
    raw = memoryview(packed).cast("B")
    end = bytes(raw[: 1 << 16]).find(b"\n")
    found, position = {}, end + 1
    for name, dtype, shape in json.loads(bytes(raw[:end])):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        found[name] = np.frombuffer(raw[position : position + size], dtype).reshape(shape)
        position += size
    return found
