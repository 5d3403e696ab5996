"""The copy of a run directory in an object store, from which a new pod continues."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from launcher.checkpoint.manifest import MANIFEST
from launcher.errors import EnvironmentProblem
from launcher.protocol.rundir import RunDir
from launcher.utils.object_store import ObjectFolder

_LOOK_EVERY_S = 5.0
_CHECKPOINTS = "checkpoints"
_STEP = re.compile(rf"{_CHECKPOINTS}/(step_\d+)/(.+)")
_LEFT_OUT = ("channel", "server")
"""Folders of a run directory that are of use only while its processes live."""
_RESTORING = ".restoring"
"""File in a run directory that is not fetched whole yet."""


class RunStore:
    """Copies the run directory of the first pod to an object store.

    A checkpoint is copied once it is complete. In the store as on the disk, that is once it has its manifest, which is
    copied last. Checkpoints that the run removes are removed there too.

        store.restore()
        with store:
            ...  # the run
        if store.problem: ...

    Args:
        url: folder of all runs, in which this one gets a folder of its own.
        run_dir: the run directory.
        say: prints a line.
    """

    def __init__(self, url: str, run_dir: RunDir, *, say: Callable[[str], object]) -> None:
        self._folder, self._say = run_dir.path, say
        self._remote = ObjectFolder(store_folder(url, str(run_dir.path)), login="backend.secret")
        self._copied: dict[str, tuple[int, int]] = {}
        """Size and time of each file that was copied, as they were."""
        self._steps: dict[str, tuple[int, int]] = {}
        """The same of the manifests of checkpoints."""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="run store", daemon=True)
        self.problem = ""
        """Why the last copy failed; empty if it did not."""

    def restore(self) -> int:
        """Fetch the run directory if it is empty; return the number of files.

        Parts of checkpoints without a manifest are left out. One that was fetched in part by a pod that ended is
        completed.

        Raises:
            EnvironmentProblem: the store cannot be read.
        """
        begun = self._folder / _RESTORING
        if not begun.exists() and self._folder.is_dir() and any(self._folder.iterdir()):
            return 0
        there = self._remote.sizes()
        whole = {found[1] for found in map(_STEP.fullmatch, there) if found and found[2] == MANIFEST}

        def is_wanted(name: str) -> bool:
            found = _STEP.fullmatch(name)
            return found is None or found[1] in whole

        if there:
            self._folder.mkdir(parents=True, exist_ok=True)
            begun.touch()
        num_files = self._remote.fetch(self._folder, wanted=is_wanted)
        begun.unlink(missing_ok=True)
        self._copied, self._steps = dict(self._files()), self._new_steps()
        return num_files

    def __enter__(self) -> Self:
        """Copy what is there, and start to copy checkpoints.

        Raises:
            EnvironmentProblem: the store cannot be written.
        """
        self._copy_files()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Copy the rest; ``problem`` says why that failed."""
        self._is_over.set()
        self._thread.join()
        self._try()

    def _watch(self) -> None:
        while not self._is_over.wait(_LOOK_EVERY_S):
            if self._new_steps():
                self._try()

    def _try(self) -> None:
        """Copy what is new; say once why it fails: the next checkpoint is another try."""
        try:
            self._copy_files()  # first: without run.yaml and plan.json nothing continues a checkpoint
            self._copy_checkpoints()
        except (EnvironmentProblem, OSError) as problem:
            if str(problem) != self.problem:
                self._say(f"the run directory is not copied: {problem}")
            self.problem = str(problem)
        else:
            self.problem = ""

    def _copy_files(self) -> None:
        for name, stamp in self._files():
            if self._copied.get(name) != stamp:
                self._put(name)
                self._copied[name] = stamp

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for path in sorted(self._folder.rglob("*")):
            parts = path.relative_to(self._folder).parts
            is_left_out = parts[0] in (_CHECKPOINTS, *_LEFT_OUT) or any(part.startswith(".") for part in parts)
            if not is_left_out and path.is_file() and not path.is_symlink():
                yield "/".join(parts), _stamp(path)

    def _new_steps(self) -> dict[str, tuple[int, int]]:
        manifests = sorted(self._folder.glob(f"{_CHECKPOINTS}/step_*/{MANIFEST}"))
        found = {path.parent.name: _stamp(path) for path in manifests}
        return {step: stamp for step, stamp in found.items() if self._steps.get(step) != stamp}

    def _copy_checkpoints(self) -> None:
        there = self._remote.sizes()
        for step, stamp in self._new_steps().items():
            folder = self._folder / _CHECKPOINTS / step
            names = [path.relative_to(self._folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            manifest = f"{_CHECKPOINTS}/{step}/{MANIFEST}"
            if manifest in there:  # of the same step, before a rewind
                self._remote.remove([manifest])
            try:
                self._remote.put(self._folder, [*(name for name in names if name != manifest), manifest])
            except FileNotFoundError:  # the run has pruned it meanwhile
                continue
            self._steps[step] = stamp
        self._prune()

    def _prune(self) -> None:
        """Remove checkpoints that the run removed, manifests first, and parts of incomplete ones.

        Whole checkpoints that this run directory never had stay.
        """
        kept = {path.parent.name for path in self._folder.glob(f"{_CHECKPOINTS}/step_*/{MANIFEST}")}
        there = [(found[1], found[2], name) for name in self._remote.sizes() if (found := _STEP.fullmatch(name))]
        whole = {step for step, file, _ in there if file == MANIFEST}
        gone = [name for step, _, name in there if step not in kept and (step in self._steps or step not in whole)]
        self._remote.remove(sorted(gone, key=lambda name: not name.endswith(f"/{MANIFEST}")))

    def _put(self, name: str) -> None:
        try:
            self._remote.put(self._folder, [name])
        except FileNotFoundError:
            return  # removed meanwhile


def store_folder(url: str, run_dir: str) -> str:
    """Return the URL of the folder of a run: its name and id below that of all runs."""
    name, run_id = Path(run_dir).parts[-2:]
    return f"{url.rstrip('/')}/{name}/{run_id}"


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return found.st_size, found.st_mtime_ns
