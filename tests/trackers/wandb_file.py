"""Reading a ``.wandb`` file, the log of an offline run, without the client that wrote it.

The format is LevelDB's log (github.com/google/leveldb, doc/log_format.md) with a file header and another checksum:
7 bytes of header, then blocks of 32 KiB that hold chunks of ``crc32, length, type, data``. A record is one FULL chunk
or FIRST, MIDDLE…, LAST ones. Each record is a protocol buffer ``Record``.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEADER = struct.Struct("<4sHB")
_MAGIC = (b":W&B", 0xBEE1)
_CHUNK = struct.Struct("<IHB")
_BLOCK = 32768
_FULL, _FIRST, _LAST = 1, 2, 4


@dataclass
class OfflineRun:
    """What a run file holds; a value is the last one written under its name."""

    run_id: str = ""
    project: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    exit_code: int | None = None


def read_offline_run(folder: Path) -> OfflineRun:
    """Return the run in an ``offline-run-…`` folder, as far as it was written."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    run = OfflineRun()
    for data in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.project, run.name = record.run.run_id, record.run.project, record.run.display_name
            run.group, run.job_type, run.tags = record.run.run_group, record.run.job_type, tuple(record.run.tags)
            run.config.update(_items(record.run.config.update))
        elif kind == "config":
            run.config.update(_items(record.config.update))
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary.update(_items(record.summary.update))
        elif kind == "environment":
            run.arguments = tuple(record.environment.args)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def records(data: bytes) -> Iterator[bytes]:
    """Yield each whole record; a file whose writer was killed may end inside one.

    Raises:
        ValueError: this is no run file, or a chunk's checksum differs.
    """
    *magic, _ = _HEADER.unpack_from(data)
    if tuple(magic) != _MAGIC:
        raise ValueError("not a .wandb file")
    position, parts = _HEADER.size, b""
    while position + _CHUNK.size <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK.size:  # too small for a chunk: padding
            position += left
            continue
        checksum, length, kind = _CHUNK.unpack_from(data, position)
        start, position = position + _CHUNK.size, position + _CHUNK.size + length
        if kind == 0 or position > len(data):
            return
        chunk = data[start:position]
        if zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"the chunk at byte {start} has another checksum")
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        if kind in (_FULL, _LAST):
            yield parts


def _items(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
