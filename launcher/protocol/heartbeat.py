"""Heartbeat slot: shared memory that holds only the newest state of a rank.

Writing it costs microseconds and no system call, cannot block, and cannot lose the last state of a rank that then
hangs, which is the one that matters. The host agent makes the file and reads it at its own pace.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.protocol.wire import require_fields

_BEAT_BYTES, _RECORD_BYTES = 4096, 8192


HEARTBEAT_BYTES = _BEAT_BYTES + _RECORD_BYTES
"""Bytes of one rank's shared memory: its newest heartbeat, then its exception where no file could be written."""


_HEADER = struct.Struct("<II")
"""CRC-32 and length of the JSON that follows: a state read while it is written does not match."""


HEARTBEAT_FIELDS: dict[str, Any] = {"phase": str, "step": int | None, "at": float, "numbers": dict[str, float]}


@dataclass(frozen=True, kw_only=True)
class HeartbeatState:
    """Where a rank was."""

    phase: str
    """What it had begun to do (``forward``)."""
    step: int | None
    """Optimiser step, ``None`` before the first."""
    at: float
    """``time.monotonic()`` of its host."""
    numbers: dict[str, float] = field(default_factory=dict)
    """The newest value of each number it reported (``loss``)."""


class Heartbeat:
    """A rank's side: memory, or the file that holds it. ``Heartbeat(None)`` writes nothing."""

    def __init__(self, beats: Path | mmap.mmap | None) -> None:
        self._memory = map_heartbeat_file(beats) if isinstance(beats, Path) and beats.exists() else None
        if isinstance(beats, mmap.mmap):
            self._memory = beats
        self._step: int | None = None
        self._numbers: dict[str, float] = {}

    def update(self, phase: str, step: int | None = None, **numbers: float) -> None:
        """Record that ``phase`` begins; never blocks and never raises.

        Args:
            phase: what this rank does from now on.
            step: optimiser step; kept from the last call when ``None``.
            numbers: what to show (``steps``, ``loss``, ``tokens_per_s``); those that are not finite are left out.
        """
        self._step = self._step if step is None else step
        for name, value in numbers.items():
            if math.isfinite(value):
                self._numbers[name] = value
            else:
                self._numbers.pop(name, None)
        if self._memory is None:
            return
        state = {"phase": phase, "step": self._step, "at": time.monotonic(), "numbers": self._numbers}
        payload = json.dumps(state).encode()
        assert _HEADER.size + len(payload) <= _BEAT_BYTES, "a heartbeat holds a handful of numbers"
        self._memory[: _HEADER.size + len(payload)] = _HEADER.pack(zlib.crc32(payload), len(payload)) + payload

    def write_exception_record(self, record: Mapping[str, Any]) -> None:
        """Leave the record of an exception where the agent finds it though no disk takes a file; cut to what fits."""
        if self._memory is None:
            return
        most = _RECORD_BYTES // 3
        short = {name: value[-most:] if isinstance(value, str) else value for name, value in record.items()}
        payload = json.dumps(short).encode()
        if _HEADER.size + len(payload) > _RECORD_BYTES:  # of letters that JSON escapes
            payload = json.dumps({**short, "traceback": "", "error": short["error"][-500:]}).encode()
        header = _HEADER.pack(zlib.crc32(payload), len(payload))
        self._memory[_BEAT_BYTES : _BEAT_BYTES + _HEADER.size + len(payload)] = header + payload


def create_heartbeat_file(path: Path) -> None:
    """Create the heartbeat file of a rank."""
    path.write_bytes(bytes(HEARTBEAT_BYTES))


def map_heartbeat_file(path: Path) -> mmap.mmap:
    """Map that file; the mapping outlives it."""
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), HEARTBEAT_BYTES)


def read_heartbeat(memory: mmap.mmap) -> HeartbeatState | None:
    """Return the newest state; ``None`` before the first, or when caught while it is being written."""
    payload = _payload_at(memory, 0)
    if payload is None:
        return None
    try:
        state = json.loads(payload)
        require_fields(state, HEARTBEAT_FIELDS)
        return HeartbeatState(**state)
    except (ValueError, TypeError, RecursionError):  # the rank's own code has written into its memory
        return None


def read_exception_record(memory: mmap.mmap) -> bytes | None:
    """Return the JSON that ``write_exception_record`` left; ``None`` where there is none."""
    return _payload_at(memory, _BEAT_BYTES)


def _payload_at(memory: mmap.mmap, offset: int) -> bytes | None:
    start = offset + _HEADER.size
    checksum, length = _HEADER.unpack(memory[offset:start])
    payload = memory[start : start + length]
    return payload if length and zlib.crc32(payload) == checksum else None


def heartbeat_file(scratch: Path, rank: int) -> Path:
    """Return the heartbeat file of ``rank``."""
    return scratch / f"beats.{rank}"
