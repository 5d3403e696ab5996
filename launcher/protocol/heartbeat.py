"""Heartbeat slot: shared memory that holds only the newest state of a rank.

Writing costs microseconds and no system call, never blocks, and keeps the last state of a rank that then hangs.
The host agent creates the file and reads it periodically.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from launcher.protocol.wire import MalformedMessage, decode

PREEMPTED = "preempted"
"""Number that rank 0 reports, as 1, once it has saved because the run is asked to exit."""
_STATE_BYTES, _RECORD_BYTES = 4096, 8192
HEARTBEAT_BYTES = _STATE_BYTES + _RECORD_BYTES
"""Size of a rank's slot: newest state, then its exception if the disk is full."""
_HEADER = struct.Struct("<II")
"""CRC-32 and length of the JSON that follows; a half-written state fails the checksum."""


class HeartbeatState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The newest state that a rank wrote."""

    phase: str
    """Phase that it had entered (``forward``)."""
    step: int | None
    """Optimizer step, ``None`` before the first."""
    at: float
    """``time.monotonic()`` of its host."""
    numbers: dict[str, float]
    """The newest value of each number it reported (``loss``)."""


class Heartbeat:
    """Writes a rank's state to its slot, a file or shared memory; ``None`` writes nowhere."""

    def __init__(self, slot: Path | mmap.mmap | None) -> None:
        self._memory = map_heartbeat_file(slot) if isinstance(slot, Path) and slot.exists() else None
        if isinstance(slot, mmap.mmap):
            self._memory = slot
        self._step: int | None = None
        self._numbers: dict[str, float] = {}

    def update(self, phase: str, step: int | None = None, **numbers: float) -> None:
        """Write that ``phase`` begins; never blocks, and does nothing without a slot.

        Args:
            phase: what this rank does from now on.
            step: optimizer step; kept from the last call when ``None``.
            numbers: values to show (``steps``, ``loss``, ``tokens_per_s``); those that are not finite are dropped.
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
        assert _HEADER.size + len(payload) <= _STATE_BYTES, "a heartbeat holds a handful of numbers"
        self._memory[: _HEADER.size + len(payload)] = _HEADER.pack(zlib.crc32(payload), len(payload)) + payload

    def write_exception_record(self, record: Mapping[str, Any]) -> None:
        """Write the record of an exception to the slot, truncated to fit, when the disk is full."""
        if self._memory is None:
            return
        limit = _RECORD_BYTES // 3
        short = {name: value[-limit:] if isinstance(value, str) else value for name, value in record.items()}
        payload = json.dumps(short).encode()
        if _HEADER.size + len(payload) > _RECORD_BYTES:  # the letters need JSON escapes
            payload = json.dumps({**short, "traceback": "", "error": short["error"][-500:]}).encode()
        header = _HEADER.pack(zlib.crc32(payload), len(payload))
        self._memory[_STATE_BYTES : _STATE_BYTES + _HEADER.size + len(payload)] = header + payload


def create_heartbeat_file(path: Path) -> None:
    """Create the slot of a rank, empty."""
    path.write_bytes(bytes(HEARTBEAT_BYTES))


def map_heartbeat_file(path: Path) -> mmap.mmap:
    """Map that file into memory; the mapping stays valid when the file is removed."""
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), HEARTBEAT_BYTES)


def read_heartbeat(memory: mmap.mmap) -> HeartbeatState | None:
    """Return the newest state; ``None`` before the first, or while the rank is writing."""
    payload = _payload_at(memory, 0)
    if payload is None:
        return None
    try:
        state: HeartbeatState = decode(payload, HeartbeatState)
    except MalformedMessage:  # the user's code has overwritten the memory
        return None
    return state


def read_exception_record(memory: mmap.mmap) -> bytes | None:
    """Return the JSON of ``write_exception_record``; ``None`` without a record."""
    return _payload_at(memory, _STATE_BYTES)


def _payload_at(memory: mmap.mmap, offset: int) -> bytes | None:
    start = offset + _HEADER.size
    checksum, length = _HEADER.unpack(memory[offset:start])
    payload = memory[start : start + length]
    return payload if length and zlib.crc32(payload) == checksum else None


def heartbeat_file(scratch: Path, rank: int) -> Path:
    """Return the file of the slot of ``rank``."""
    return scratch / f"heartbeat.{rank}"
