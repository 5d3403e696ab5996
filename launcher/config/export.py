"""Options of the verb ``export``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from launcher.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)B", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a checkpoint is written as a model folder."""

    format: Literal["safetensors"] = "safetensors"
    """Files that Transformers, vLLM and most other programs load."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Format of the weights. A checkpoint holds them in fp32; bf16 and fp16 take half of it."""

    max_shard_size: str = "5GB"
    """Bytes of one file at most, as ``500MB`` or ``5GB``; a tensor is never split."""

    merge: bool = False
    """Of a run with an adapter: add it to the model's weights, and write the whole model.
    Otherwise the folder holds the adapter alone, as PEFT writes it."""

    @property
    def max_shard_bytes(self) -> int:
        """``max_shard_size`` in bytes."""
        found = _SIZE.fullmatch(self.max_shard_size)
        return int(float(found[1]) * _FACTORS[found[2].upper()]) if found else 0

    def validate(self) -> Iterator[ConfigError]:
        """Reject a size that is none."""
        if self.max_shard_bytes < 1:
            fix = "write max_shard_size=5GB"
            yield ConfigError("max_shard_size", self.max_shard_size, why="is not a size above 0", fix=fix)
