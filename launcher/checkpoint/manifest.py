"""manifest.json of a checkpoint: its contents and checksums.

It is written last, so its existence marks a complete checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from launcher.config.model.base import Model
from launcher.config.parallel.base import Parallel
from launcher.config.precision import Precision
from launcher.errors import ConfigError
from launcher.utils.files import read_regular, write_json
from launcher.utils.schema import build, to_tree

MANIFEST = "manifest.json"
_BLOCK_BYTES = 1 << 20
_THREADS = 4
"""That hash files side by side: hashlib releases the GIL."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """One checkpoint, described."""

    version: Literal[1] = 1
    """Of this format."""
    step: int
    """Optimizer steps done."""
    created: float
    """Seconds since 1970."""
    run_id: str
    run_hash: str
    """SHA-256 of the run.yaml it was written under."""
    architecture: dict[str, Any]
    """Value of ``Model.architecture()``."""
    engine: str
    parallel: dict[str, Any]
    """The strategy with its ``kind`` and every option."""
    precision: str
    world_size: int
    eval_loss: float | None = None
    """Held-out loss in nats a token at this step, where it was measured."""
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of each file of the payload, by its path below the checkpoint."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Checksum of each of these files; empty in manifests that an earlier version wrote."""
    lr: float | None = None
    """Learning rate of the last step; ``null`` without a step, or in old manifests."""


def describe_checkpoint(
    *,
    model: Model,
    parallel: Parallel,
    precision: Precision,
    world_size: int,
    step: int,
    eval_loss: float | None,
    run_id: str,
    run_hash: str,
    lr: float | None = None,
) -> CheckpointManifest:
    """Return the manifest of a run at ``step``; the store adds the files."""
    return CheckpointManifest(
        step=step,
        created=time.time(),
        run_id=run_id,
        run_hash=run_hash,
        architecture=to_tree(model.architecture()),
        engine=parallel.engine,
        parallel=to_tree(parallel),
        precision=precision.kind,
        world_size=world_size,
        eval_loss=eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None,
        lr=lr,
    )


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest of a finished payload, atomically."""
    write_json(folder / MANIFEST, to_tree(manifest))


def read_manifest(folder: Path) -> CheckpointManifest:
    """Return the manifest of a checkpoint.

    Raises:
        ValueError: there is none, or it is damaged or of another format; the message says which.
    """
    try:
        tree = json.loads(read_regular(folder / MANIFEST))
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, so it was not finished") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error})") from error
    mistakes: list[ConfigError] = []
    manifest = (
        build(CheckpointManifest, tree, path=MANIFEST, report=mistakes.append) if isinstance(tree, dict) else None
    )
    if manifest is None:
        why = mistakes[0] if mistakes else "not a mapping"
        raise ValueError(f"its {MANIFEST} is damaged, or of another version ({why})")
    if problem := next(_validate(folder, manifest), None):
        raise ValueError(f"its {MANIFEST} is damaged ({problem})")
    return manifest


def _validate(folder: Path, manifest: CheckpointManifest) -> Iterator[str]:
    """Yield invalid values: counts below their minimum, and paths outside the checkpoint."""
    if manifest.step < 0 or manifest.world_size < 1:
        yield f"step={manifest.step} world_size={manifest.world_size}"
    named = re.fullmatch(r"step_(\d+)", folder.name)
    if named and int(named[1]) != manifest.step:
        yield f"step={manifest.step} in a folder called {folder.name}"
    for name, num_bytes in manifest.files.items():
        path = PurePosixPath(name)
        if not name or "\0" in name or path.is_absolute() or ".." in path.parts or str(path) != name:
            yield f"files: {name!r} is not a path below the checkpoint"
        if num_bytes < 0:
            yield f"files: {name} has {num_bytes} bytes"
    if manifest.sha256 and manifest.sha256.keys() != manifest.files.keys():
        name = min(manifest.sha256.keys() ^ manifest.files.keys())
        yield f"sha256 and files do not list the same files: {name!r}"
    for name, digest in manifest.sha256.items():
        if not _SHA256.fullmatch(digest):
            yield f"sha256: {digest!r} of {name} is not a SHA-256"


def missing_payload(folder: Path, manifest: CheckpointManifest) -> str | None:
    """Return which files a payload lacks by its manifest; ``None`` if all have their size."""
    for name, num_bytes in manifest.files.items():
        try:
            found = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        if not stat.S_ISREG(found.st_mode):
            return f"{name} is not a regular file"
        if found.st_size != num_bytes:
            return f"{name} has {found.st_size} bytes and should have {num_bytes}"
    return None


def damaged_files(
    folder: Path, manifest: CheckpointManifest, names: Iterable[str], *, heartbeat: Callable[[], None] = lambda: None
) -> list[str]:
    """Return those of ``names`` whose content differs from its checksum.

    None if the manifest has no checksums.
    """
    expected = {name: manifest.sha256[name] for name in names if name in manifest.sha256}
    found = checksums(folder, expected, heartbeat=heartbeat)
    return sorted(name for name, digest in expected.items() if found.get(name) != digest)


def model_folder_damage(folder: Path, *, weights: bool) -> str | None:
    """Return how a model folder differs from its checkpoint's manifest.

    ``None`` if it does not, or if there is no manifest.

    Args:
        folder: perhaps ``model/`` of a checkpoint, under any option that takes a folder.
        weights: whether the weights are loaded too, and not only the config and the tokenizer.
    """
    folder = folder.resolve()
    if not (folder.parent / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(folder.parent)
    except ValueError as error:
        return str(error)
    names = [name for name in manifest.files if name.startswith(f"{folder.name}/")]
    bad = damaged_files(folder.parent, manifest, [name for name in names if weights or ".safetensors" not in name])
    return f"the content of {', '.join(bad)} is not what was written (SHA-256)" if bad else None


def checksums(folder: Path, names: Iterable[str], *, heartbeat: Callable[[], None] = lambda: None) -> dict[str, str]:
    """Return the SHA-256 of each file by its path below ``folder``, without unreadable files."""

    def digest(name: str) -> str | None:
        found = hashlib.sha256()
        try:
            with (folder / name).open("rb", buffering=0) as file:
                while block := file.read(_BLOCK_BYTES):
                    found.update(block)
                    heartbeat()
        except OSError:
            return None
        return found.hexdigest()

    names = list(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = zip(names, threads.map(digest, names), strict=True)
        return {name: found for name, found in digests if found is not None}


def files_of_part(sizes: Mapping[str, int], *, part: int, parts: int) -> list[str]:
    """Return the files that part ``part`` of ``parts`` hashes; parts have about equal bytes."""
    loads, own = [0] * parts, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name] + 1
        if least == part:
            own.append(name)
    return own
