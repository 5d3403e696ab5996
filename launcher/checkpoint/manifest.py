"""manifest.json of a checkpoint: its contents and checksums.

It is written last, so its existence marks a complete checkpoint. The checksums of its files find damage: XXH3 reads ten
times as fast as SHA-256 does, which would protect no better: a user who may change a file may change the manifest.
"""

from __future__ import annotations

import json
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import xxhash

from launcher.checkpoint.adapter_base import BaseWeights, adapter_tree, base_weights
from launcher.config.checkpoint import LOWEST_LOSS
from launcher.config.run import Run
from launcher.errors import ConfigError
from launcher.protocol.state_files import TENSOR_FOLDER
from launcher.utils.files import read_regular, sha256_of, write_json
from launcher.utils.schema import build, to_tree
from launcher.utils.text import shell_word, short_path

MANIFEST = "manifest.json"
_CHECKSUM = "checksum"
"""In the file: SHA-256 of everything else in it."""
COMPARED_BYTES = 1 << 20
"""Read between two calls of a heartbeat, where files are compared."""
_THREADS = 4
"""That read files side by side: reading and xxhash release the GIL."""
_XXH3 = re.compile(r"[0-9a-f]{32}")


VERSION = 3
"""Of the format that this program writes and reads."""


class UnsupportedManifest(ValueError):
    """A manifest of another version of this format: the checkpoint is intact, but not read.

    Args:
        folder: of the checkpoint.
        version: that its manifest states.
    """

    def __init__(self, folder: Path, version: int) -> None:
        file, age = short_path(folder / MANIFEST), "a newer" if version > VERSION else "an older"
        super().__init__(f"{file} has version {version}, this launcher reads {VERSION}: {age} launcher wrote it")
        export = f"let that launcher write its model, launch export {shell_word(short_path(folder))} DIR"
        fix = f"{export}, and load it here with model=hf model.name=DIR"
        self.fix = f"update this launcher, or {fix}" if version > VERSION else fix
        """What the user can do."""


@dataclass(frozen=True)
class WrittenFile:
    """A file of a payload, as written."""

    num_bytes: int
    checksum: str
    """XXH3 of 128 bits, hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class DataCursor:
    """Where the run stands in its data.

    The order of samples follows from the seed and the step alone.
    """

    seed: int
    """``job.seed``."""
    global_batch: int
    """Sequences of a step."""
    sequence_length: int
    """Tokens of a sequence."""
    sequences: int
    """Drawn so far, also those that were skipped."""
    skipped: int = 0
    """Sequences drawn and not trained on: ``job.on_bad_step=rewind`` skipped them."""


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """One checkpoint, described."""

    version: Literal[3] = 3
    """Of this format."""
    step: int
    """Optimizer steps done."""
    created: float
    """Seconds since 1970."""
    run_id: str
    run_hash: str
    """SHA-256 of the run.yaml it was written under."""
    wandb_id: str = ""
    """Id of the tracker's run."""
    architecture: dict[str, Any]
    """Value of ``Model.architecture()``."""
    engine: str
    parallel: dict[str, Any]
    """The strategy with its ``kind`` and every option."""
    precision: str
    optimizer: str = ""
    """Kind of the optimizer, whose state is stored; empty for what does not train."""
    world_size: int
    adapter: dict[str, Any] = field(default_factory=dict)
    """The adapter that the checkpoint holds, with every option; empty for a whole model."""
    base: BaseWeights | None = None
    """The weights that the adapter was trained on."""
    data: DataCursor | None = None
    """``null`` for what does not train."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """The schedule with its ``kind`` and every option, and ``steps``, over which it is laid."""
    lr: float | None = None
    """Learning rate of the last step; ``null`` without a step."""
    eval_loss: float | None = None
    """Held-out loss in nats a token at this step, where it was measured."""
    eval_metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of plugins at this step, where they were measured."""
    best_metric: str = LOWEST_LOSS
    """Which checkpoint of the run is the best: ``min:NAME`` or ``max:NAME``."""
    recent_losses: tuple[float, ...] = ()
    """Losses of the last good steps, with which ``job.spike_factor`` compares the next one."""
    best_value: float | None = None
    """Metric that evaluations must improve, of ``job.early_stopping_patience``; else ``null``."""
    stale_evaluations: int = 0
    """Evaluations in a row that did not."""
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of each file of the payload, by its path below the checkpoint."""
    xxh3: dict[str, str] = field(default_factory=dict)
    """Checksum of each of these files: XXH3 of 128 bits."""

    def metric(self, name: str) -> float | None:
        """Return the value of an evaluation's metric; ``None`` where it was not measured."""
        return self.eval_loss if name == "loss" else self.eval_metrics.get(name)

    @property
    def tokens(self) -> int:
        """Tokens of the sequences trained on so far."""
        return (self.data.sequences - self.data.skipped) * self.data.sequence_length if self.data else 0


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """Where a run stands, besides its weights and moments."""

    step: int
    """Optimizer steps done."""
    sequences: int
    """Drawn so far."""
    skipped: int = 0
    """Sequences drawn and not trained on."""
    recent_losses: tuple[float, ...] = ()
    """Of the last good steps."""
    eval_loss: float | None = None
    """Held-out loss at this step, where it was measured."""
    eval_metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of plugins at this step."""
    best_value: float | None = None
    """The metric that evaluations must improve."""
    stale_evaluations: int = 0
    """Evaluations in a row that did not."""


def describe_checkpoint(
    run: Run, progress: TrainingProgress, *, world_size: int, plan: Mapping[str, Any]
) -> CheckpointManifest:
    """Return the manifest of a run; the store adds the files.

    Args:
        run: that trains.
        progress: where it stands.
        world_size: ranks in all.
        plan: content of its plan.json, for the ids.
    """
    step, steps = progress.step, run.job.optimizer_steps
    data = None
    if steps is not None:
        data = DataCursor(
            seed=run.job.seed,
            global_batch=run.batched_job.batch(run, world_size=world_size).global_batch,
            sequence_length=run.batched_job.sequence_length,
            sequences=progress.sequences,
            skipped=progress.skipped,
        )
    return CheckpointManifest(
        step=step,
        created=time.time(),
        run_id=plan["run_id"],
        run_hash=plan["run_hash"],
        wandb_id=plan.get("tracker", {}).get("run_id", ""),
        architecture=to_tree(run.model.architecture()),
        engine=run.parallel.engine,
        parallel=to_tree(run.parallel),
        precision=run.precision.kind,
        optimizer=run.optimizer.kind if steps is not None else "",
        world_size=world_size,
        adapter=adapter_tree(run.lora),
        base=None if run.lora is None else base_weights(run.model, seed=run.job.seed),
        data=data,
        schedule=to_tree(run.schedule) | {"steps": steps},
        lr=run.optimizer.lr * run.schedule.factor(step - 1, steps) if steps and step else None,
        eval_loss=progress.eval_loss,
        eval_metrics=dict(progress.eval_metrics),
        best_metric=run.checkpoint.best_metric,
        recent_losses=progress.recent_losses,
        best_value=progress.best_value,
        stale_evaluations=progress.stale_evaluations,
    )


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest of a finished payload, with its own checksum, atomically."""
    tree = to_tree(manifest)
    write_json(folder / MANIFEST, tree | {_CHECKSUM: _checksum(tree)})


def _checksum(tree: Mapping[str, Any]) -> str:
    return sha256_of(json.dumps(tree, sort_keys=True).encode())


def read_manifest(folder: Path) -> CheckpointManifest:
    """Return the manifest of a checkpoint.

    Raises:
        UnsupportedManifest: another version of this program wrote it.
        ValueError: there is none, or it is damaged; the message says which.
    """
    try:
        tree = json.loads(read_regular(folder / MANIFEST))
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, so it was not finished") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error})") from error
    found = tree.get("version") if isinstance(tree, dict) else None
    if isinstance(tree, dict) and (found is None or isinstance(found, bool)):
        raise ValueError(f"its {MANIFEST} is damaged (version={json.dumps(found)})")
    if isinstance(found, int) and found != VERSION:
        raise UnsupportedManifest(folder, found)
    checksum = tree.pop(_CHECKSUM, None) if isinstance(tree, dict) else None
    mistakes: list[ConfigError] = []
    manifest = (
        build(CheckpointManifest, tree, path=MANIFEST, report=mistakes.append) if isinstance(tree, dict) else None
    )
    if manifest is None:
        why = mistakes[0] if mistakes else "not a mapping"
        raise ValueError(f"its {MANIFEST} is damaged ({why})")
    if problem := next(_validate(folder, manifest), None):
        raise ValueError(f"its {MANIFEST} is damaged ({problem})")
    if checksum != _checksum(tree):
        raise ValueError(f"its {MANIFEST} is damaged (its checksum is that of another content)")
    return manifest


def _validate(folder: Path, manifest: CheckpointManifest) -> Iterator[str]:
    """Yield invalid values: counts below their minimum, and paths outside the checkpoint."""
    if manifest.step < 0 or manifest.world_size < 1:
        yield f"step={manifest.step} world_size={manifest.world_size}"
    named = re.fullmatch(r"step_(\d+)", folder.name)
    if named and int(named[1]) != manifest.step:
        yield f"step={manifest.step} in a folder called {folder.name}"
    if (data := manifest.data) is not None:
        if not 0 <= data.skipped <= data.sequences:
            yield f"data: sequences={data.sequences} skipped={data.skipped}"
        if min(data.global_batch, data.sequence_length) < 1:
            yield f"data: global_batch={data.global_batch} sequence_length={data.sequence_length}"
    if manifest.stale_evaluations < 0:
        yield f"stale_evaluations={manifest.stale_evaluations}"
    for name, num_bytes in manifest.files.items():
        path = PurePosixPath(name)
        if not name or "\0" in name or path.is_absolute() or ".." in path.parts or str(path) != name:
            yield f"files: {name!r} is not a path below the checkpoint"
        if num_bytes < 0:
            yield f"files: {name} has {num_bytes} bytes"
    if manifest.xxh3.keys() != manifest.files.keys():
        name = min(manifest.xxh3.keys() ^ manifest.files.keys())
        yield f"xxh3 and files do not list the same files: {name!r}"
    for name, digest in manifest.xxh3.items():
        if not _XXH3.fullmatch(digest):
            yield f"xxh3: {digest!r} of {name} is not a checksum"


def new_checksum() -> xxhash.xxh3_128:
    """Return the checksum of no bytes; its ``update`` adds some."""
    return xxhash.xxh3_128()


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
    """Return those of ``names`` whose content differs from its checksum."""
    expected = {name: manifest.xxh3[name] for name in names}
    found = checksums(folder, expected, heartbeat=heartbeat)
    return sorted(name for name, digest in expected.items() if found.get(name) != digest)


def model_folder_damage(folder: Path, *, weights: bool) -> str | None:
    """Return how a model folder differs from its checkpoint's manifest.

    ``None`` if it does not, or if there is no manifest.

    Args:
        folder: perhaps ``model/`` of a checkpoint, under any option that takes a folder.
        weights: whether the weights are loaded too, and not only the config and the tokenizer.

    Raises:
        UnsupportedManifest: another version of this program wrote the checkpoint.
    """
    folder = folder.resolve()
    if not (folder.parent / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(folder.parent)
    except UnsupportedManifest:
        raise
    except ValueError as error:
        return str(error)
    read = (f"{folder.name}/", *([f"{TENSOR_FOLDER}/"] if weights else []))
    bad = damaged_files(folder.parent, manifest, [name for name in manifest.files if name.startswith(read)])
    return f"the content of {', '.join(bad)} is not what was written (XXH3)" if bad else None


def checksums(folder: Path, names: Iterable[str], *, heartbeat: Callable[[], None] = lambda: None) -> dict[str, str]:
    """Return the XXH3 of each file by its path below ``folder``, without unreadable files."""

    def digest(name: str) -> str | None:
        found = new_checksum()
        try:
            with (folder / name).open("rb", buffering=0) as file:
                while block := file.read(COMPARED_BYTES):
                    found.update(block)
                    heartbeat()
        except OSError:
            return None
        return found.hexdigest()

    names = list(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = zip(names, threads.map(digest, names), strict=True)
        return {name: found for name, found in digests if found is not None}


def adapter_manifest(folder: Path) -> CheckpointManifest | None:
    """Return the manifest of the checkpoint around an adapter; ``None`` for other folders."""
    folder = folder.resolve()
    if not (folder.parent / MANIFEST).exists():
        return None
    try:
        return read_manifest(folder.parent)
    except ValueError:
        return None  # the check of the folder reports it


def files_of_part(sizes: Mapping[str, int], *, part: int, parts: int) -> list[str]:
    """Return the files that part ``part`` of ``parts`` hashes; parts have about equal bytes."""
    loads, own = [0] * parts, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name] + 1
        if least == part:
            own.append(name)
    return own
