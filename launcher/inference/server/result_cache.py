"""Cache of deterministic results, limited in bytes and time; equal requests share one run."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launcher.checkpoint.manifest import read_manifest
from launcher.config.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from launcher.config.model.folder import checkpoint_files, weight_files
from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import FinishReason, GeneratedToken, RequestImage
from launcher.inference.server.request_state import RequestState
from launcher.models.pretrained import weights_folder
from launcher.protocol.foreign_files import find_foreign
from launcher.protocol.state_files import TENSOR_FOLDER
from launcher.utils.files import sha256_of
from launcher.utils.schema import to_tree

if TYPE_CHECKING:
    from launcher.config.run import Run


CacheStatus = Literal["hit", "shared", "miss", "bypass"]
"""Cached; in flight for another request; submitted and cached at its end; not cacheable."""
_ENTRY_BYTES, _TOKEN_BYTES, _TOP_BYTES = 512, 64, 48
"""About what CPython takes for an entry, a token, and each of a token's alternatives."""


@dataclass(frozen=True, kw_only=True)
class _CachedResult:
    tokens: tuple[GeneratedToken, ...]
    finish_reason: FinishReason
    ended_by_stop_string: bool
    size: int
    expires: float


class ResultCache:
    """Results of sequences; the least recently used one is evicted first.

    Args:
        max_bytes: room; 0 keeps nothing, and shares nothing.
        ttl_s: how long a result is kept.
        now: the clock.
    """

    def __init__(self, max_bytes: int, *, ttl_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes, self._ttl_s, self._now = max_bytes, ttl_s, now
        self._kept: OrderedDict[str, _CachedResult] = OrderedDict()
        self._in_flight: dict[str, RequestState] = {}
        self.bytes = self.hits = self.misses = self.shared = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: str, state: RequestState) -> tuple[RequestState, CacheStatus]:
        """Return the state of ``key``'s result: a cached one, one in flight, or ``state`` itself.

        Args:
            key: of everything that decides the result.
            state: filled where the result is cached; submitted by the caller where it is a miss.
        """
        if not self.max_bytes:
            return state, "bypass"
        result = self._kept.get(key)
        if result is not None and result.expires <= self._now():
            self._drop(key)
            result = None
        if result is not None:
            self._kept.move_to_end(key)
            self.hits += 1
            state.tokens.extend(result.tokens)
            state.finish_reason, state.ended_by_stop_string = result.finish_reason, result.ended_by_stop_string
            return state, "hit"
        if (other := self._in_flight.get(key)) is not None and not other.is_done:
            self.shared += 1
            return other, "shared"
        self.misses += 1
        self._in_flight[key] = state
        return state, "miss"

    def complete(self, key: str, state: RequestState) -> None:
        """Store the result of ``state``, if it has one."""
        if self._in_flight.get(key) is state:
            del self._in_flight[key]
        if state.finish_reason in ("stop", "length"):
            self._store(key, tuple(state.tokens), state.finish_reason, ended_by_stop_string=state.ended_by_stop_string)

    def _store(
        self, key: str, tokens: tuple[GeneratedToken, ...], finish_reason: FinishReason, *, ended_by_stop_string: bool
    ) -> None:
        size = _ENTRY_BYTES + sum(_TOKEN_BYTES + _TOP_BYTES * len(token.top) for token in tokens)
        if size > self.max_bytes:
            return
        self._drop(key)
        expires = self._now() + self._ttl_s
        self._kept[key] = _CachedResult(
            tokens=tokens,
            finish_reason=finish_reason,
            ended_by_stop_string=ended_by_stop_string,
            size=size,
            expires=expires,
        )
        self.bytes += size
        while self.bytes > self.max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: str) -> None:
        if (result := self._kept.pop(key, None)) is not None:
            self.bytes -= result.size


_READ_BYTES = 1 << 22


def model_fingerprint(run: Run, *, tokenizer: str, processor: str = "", heartbeat: Callable[[], None]) -> str:
    """Return a hash that changes when an equal request may get another answer.

    Reads all weights once.

    Args:
        run: the model, how it is computed, and by which engine.
        tokenizer: fingerprint of the tokenizer.
        processor: fingerprint of the processor of images.
        heartbeat: called meanwhile.
    """
    computed = {
        name: to_tree(getattr(run, name)) for name in ("model", "parallel", "precision", "attention", "compile")
    }
    job = to_tree(run.job)
    parts = {
        **computed,
        "engine": [job["engine"], job["batching"]],
        "weights": _weights_hash(run, heartbeat=heartbeat),
        "tokenizer": tokenizer,
        "processor": processor,
        "adapters": {name: _adapter_hash(folder) for name, folder in job["adapters"].items()},
    }
    return sha256_of(json.dumps(parts, sort_keys=True).encode())


def _adapter_hash(value: str) -> str:
    """Return a hash of an adapter's config and tensors."""
    folder = Path(value).expanduser()
    config, weights = (folder / ADAPTER_CONFIG).read_bytes(), folder / ADAPTER_WEIGHTS
    return sha256_of(config + (weights.read_bytes() if weights.is_file() else _checkpoint_hash(folder).encode()))


def _checkpoint_hash(folder: Path) -> str:
    """Return a hash of the tensors of the checkpoint whose ``model/`` this is."""
    hashes = read_manifest(folder.resolve().parent).xxh3.items()
    return sha256_of(json.dumps([pair for pair in hashes if pair[0].startswith(TENSOR_FOLDER)]).encode())


def _weights_hash(run: Run, *, heartbeat: Callable[[], None]) -> str:
    """Return a hash of the weights, or what random ones are drawn from."""
    if run.job.kind == "serve" and to_tree(run.job)["engine"] == "echo":
        return "none"
    folder = weights_folder(run.model, heartbeat=heartbeat)
    if folder is None:
        return f"random {run.job.seed} {json.dumps(run.model.architecture(), sort_keys=True)}"
    digest = hashlib.sha256()
    if checkpoint_files(folder):
        return _checkpoint_hash(folder)
    files = weight_files(folder)
    if not files and (foreign := find_foreign(folder)) is not None:
        files = foreign.weight_files()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                heartbeat()
    return digest.hexdigest()


def result_key(
    fingerprint_hash: str,
    prompt: Sequence[int],
    sampling: SamplingParams,
    stops: Sequence[str],
    *,
    adapter: str = "",
    images: Sequence[RequestImage] = (),
) -> str:
    """Return the key of one sequence's result: everything that decides it."""
    parts = [fingerprint_hash, adapter, list(prompt), asdict(sampling), sorted(stops)]
    parts += [image.content for image in images]
    return sha256_of(json.dumps(parts, separators=(",", ":")).encode())
