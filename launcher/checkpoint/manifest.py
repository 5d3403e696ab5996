"""The manifest: what a checkpoint is of, written last, so that whatever has one is complete."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launcher.errors import ConfigError
from launcher.files import write_json
from launcher.models.base import Model
from launcher.parallel.base import Parallel
from launcher.precision import Precision
from launcher.schema import build, to_tree

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One checkpoint, described."""

    version: Literal[1] = 1
    """Of this format."""
    step: int
    """Optimiser steps done."""
    created: float
    """Seconds since 1970."""
    run_id: str
    run_hash: str
    """SHA-256 of the run.yaml it was written under."""
    architecture: dict[str, Any]
    """What ``Model.architecture()`` said."""
    engine: str
    parallel: dict[str, Any]
    """The strategy with its ``kind`` and every option."""
    precision: str
    world_size: int
    eval_loss: float | None = None
    """Held-out loss in nats a token at this step, where it was measured."""
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of each file of the payload, by its path below the checkpoint."""


def describe(
    *,
    model: Model,
    parallel: Parallel,
    precision: Precision,
    world_size: int,
    step: int,
    eval_loss: float | None,
    run_id: str,
    run_hash: str,
) -> Manifest:
    """Return the manifest of a run at ``step``; the store adds the files."""
    return Manifest(
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
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a finished payload, atomically."""
    write_json(folder / MANIFEST, to_tree(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        ValueError: there is none, or not one of this format; the message says which.
    """
    try:
        tree = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, so it was not finished") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error})") from error
    mistakes: list[ConfigError] = []
    manifest = build(Manifest, tree, path=MANIFEST, report=mistakes.append) if isinstance(tree, dict) else None
    if manifest is None:
        raise ValueError(f"its {MANIFEST} is of another version ({mistakes[0] if mistakes else 'not a mapping'})")
    return manifest


def missing_payload(folder: Path, manifest: Manifest) -> str | None:
    """Return what a payload lacks compared with its manifest, or ``None`` when it is whole."""
    for name, num_bytes in manifest.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != num_bytes:
            return f"{name} has {found} bytes and should have {num_bytes}"
    return None
