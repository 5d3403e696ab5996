"""The checkpoint benchmark: a training loop in each saving mode, and its report."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from launcher.benchmarks.harness import DistributedCase, run_interleaved
from launcher.benchmarks.instruments import random_batches, tensors_digest
from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults
from launcher.checkpoint.manifest import TrainingProgress
from launcher.checkpoint.store import CheckpointStore, silent
from launcher.config.benchmark.io import NO_SAVING, CheckpointBenchmark
from launcher.engines.base import make_engine
from launcher.engines.distributed import barrier, group_timeout
from launcher.engines.torch import TorchEngine
from launcher.errors import JobError
from launcher.profiling.performance import StepClock
from launcher.protocol.quantities import spread
from launcher.training.saving import CheckpointSaver
from launcher.verification.forked_ranks import preload_modules

if TYPE_CHECKING:
    from launcher.benchmarks.harness import CaseRun, Numbers
    from launcher.engines.base import Engine
    from launcher.engines.context import Context
    from launcher.verification.forked_ranks import CaseAnswer


def run_checkpoint_benchmark(benchmark: CheckpointBenchmark, context: Context) -> BenchmarkResults | None:
    """Train in each mode in turn, on all ranks."""
    loop = partial(train_and_save, every=benchmark.every, saves=benchmark.saves, warmup=benchmark.warmup)
    cases: dict[str, DistributedCase] = {
        mode: DistributedCase(
            run=context.run, world_size=context.world_size, work=partial(loop, mode=mode), fold=fold_ranks
        )
        for mode in benchmark.modes
    }
    preload_modules(context, deepspeed=context.run.parallel.engine == "deepspeed")
    found = run_interleaved(cases, repeats=benchmark.repeats, limit_s=benchmark.case_timeout_s, context=context)
    return checkpoint_report(benchmark, found) if context.is_main else None


class Saver(Protocol):
    """A way to save. Every method is called by all ranks together."""

    durable_s: list[float]
    """For each save on rank 0: seconds from its beginning until it was complete and on the disk."""

    @property
    def is_writing(self) -> bool:
        """Whether something is written beside the steps, on this rank."""

    def save(self, step: int) -> None:
        """Save, or start to; training continues when this returns."""

    def wait(self) -> None:
        """Return once everything that was begun is on the disk."""

    def restore(self) -> Path:
        """Load what was saved last; return its folder, read from the disk again."""


class OurSaver:
    """Saves as job=train does, by ``checkpoint.async_mode``.

    Args:
        context: of this rank.
        engine: whose state is saved.
        folder: of the checkpoints.
        mode: of ``checkpoint.async_mode``.
    """

    def __init__(self, context: Context, engine: Engine, folder: Path, mode: str) -> None:
        changed: dict[str, Any] = {"keep": 1, "keep_best": False, "async_mode": mode}
        policy = replace(context.run.checkpoint, **changed)
        context = replace(context, run=replace(context.run, checkpoint=policy))
        self._engine, self._store = engine, CheckpointStore(folder, policy, say=silent)
        self._saver = CheckpointSaver(self._store, context, engine)
        self.durable_s = self._saver.durable_s

    @property
    def is_writing(self) -> bool:
        """Whether the thread is not done."""
        return self._saver.is_writing

    def save(self, step: int) -> None:
        """Write everything, or copy it."""
        self._saver.save(TrainingProgress(step=step, sequences=0))

    def wait(self) -> None:
        """Wait for the thread."""
        self._saver.wait()

    def restore(self) -> Path:
        """Load it as a run that resumes does."""
        saved = self._store.latest()
        assert saved is not None, "a save that ended without an error"
        drop_page_cache(saved.folder)
        barrier()
        self._engine.load(saved.folder)
        return saved.folder


class DcpSaver:
    """torch.distributed.checkpoint alone: its files, neither hashed nor renamed.

    Args:
        context: of this rank.
        engine: whose tensors are saved.
        folder: of what it writes.
        mode: ``dcp_save`` or ``dcp_async_save``.
    """

    def __init__(self, context: Context, engine: Engine, folder: Path, mode: str) -> None:
        assert isinstance(engine, TorchEngine), "others are refused before anything starts"
        self._tensors, self._folder, self._is_async = engine.tensors, folder, mode == "dcp_async_save"
        self._group = dist.new_group(backend="gloo", timeout=group_timeout(context)) if dist.is_initialized() else None
        self._threads = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self.durable_s: list[float] = []

    @property
    def is_writing(self) -> bool:
        """Whether ``async_save`` is not done."""
        return self._pending is not None and not self._pending.done()

    def save(self, step: int) -> None:
        """Write everything, or copy it once the last one is written."""
        started = time.perf_counter()
        self.wait()
        options: dict[str, Any] = {
            "storage_writer": FileSystemWriter(str(self._folder / "last"), overwrite=True),
            "process_group": self._group,
            "no_dist": self._group is None,
        }
        if self._is_async:
            written: Any = dcp.async_save(self._tensors(), **options)
            self._pending = self._threads.submit(self._finish, written, started)
        else:
            dcp.save(self._tensors(), **options)
            self.durable_s.append(time.perf_counter() - started)

    def _finish(self, written: Any, started: float) -> None:
        written.result()
        self.durable_s.append(time.perf_counter() - started)

    def wait(self) -> None:
        """Wait for the thread."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        barrier()

    def restore(self) -> Path:
        """Load weights and moments."""
        folder = self._folder / "last"
        drop_page_cache(folder)
        barrier()
        dcp.load(dict(self._tensors()), storage_reader=FileSystemReader(str(folder)), no_dist=self._group is None)
        return folder


class DeepSpeedSaver:
    """DeepSpeed's own ``save_checkpoint`` and ``load_checkpoint``.

    Args:
        context: of this rank.
        engine: whose state is saved.
        folder: of what it writes.
        mode: not used; there is one.
    """

    def __init__(self, context: Context, engine: Engine, folder: Path, mode: str) -> None:
        from launcher.engines.deepspeed.base import DeepSpeedEngineBase

        assert isinstance(engine, DeepSpeedEngineBase), "others are refused before anything starts"
        self._deepspeed, self._folder, self._context = engine.deepspeed, folder, context
        self.durable_s: list[float] = []

    @property
    def is_writing(self) -> bool:
        """Never: ``save_checkpoint`` returns when everything is written."""
        return False

    def save(self, step: int) -> None:
        """Write everything in the place of the last one."""
        started = time.perf_counter()
        if self._context.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir()
        barrier()
        self._deepspeed.save_checkpoint(str(self._folder), tag="last", save_latest=False)
        self.durable_s.append(time.perf_counter() - started)

    def wait(self) -> None:
        """Nothing is left to be done."""

    def restore(self) -> Path:
        """Load what this benchmark wrote a moment ago."""
        drop_page_cache(self._folder)
        barrier()
        self._deepspeed.load_checkpoint(str(self._folder), tag="last")
        return self._folder


SAVERS: dict[str, Callable[[Context, Engine, Path, str], Saver]] = {
    "disabled": OurSaver,
    "async": OurSaver,
    "dcp_save": DcpSaver,
    "dcp_async_save": DcpSaver,
    "deepspeed": DeepSpeedSaver,
}


def train_and_save(context: Context, *, mode: str, every: int, saves: int, warmup: int) -> CaseAnswer:
    """Train and save, then save once more and restore that; return seconds and bytes.

    Args:
        context: of this rank.
        mode: of ``SAVERS``, or ``none``.
        every: steps before each save and after the last.
        saves: in the loop.
        warmup: steps before it.
    """
    folder = context.run_dir.path / "saved"
    with make_engine(context, StepClock(context.heartbeat, cuda=torch.cuda.is_available())) as engine:
        saver = SAVERS[mode](context, engine, folder, mode) if mode in SAVERS else None
        batches = random_batches(context)

        def train() -> None:
            result = engine.step(batches, lr=context.run.optimizer.lr)  # fetches the loss, so a GPU is done too
            assert not result.skipped, "a step without an update"

        for _ in range(warmup):
            train()
        stalls, steps, beside = list[float](), list[float](), list[bool]()
        barrier()
        started = time.perf_counter()
        for step in range(1, every * (saves + 1) + 1):
            beside.append(saver is not None and saver.is_writing)
            before = time.perf_counter()
            train()
            steps.append(time.perf_counter() - before)
            if saver is not None and step % every == 0 and step <= every * saves:
                before = time.perf_counter()
                saver.save(step)
                stalls.append(time.perf_counter() - before)
        loop_s = time.perf_counter() - started
        answer: CaseAnswer = {"loop_s": loop_s, "stalls_s": stalls, "steps_s": steps, "beside": beside}
        if saver is not None:
            saver.wait()
            answer["durable_s"] = list(saver.durable_s)
            saved_at = tensors_digest(tensor for _, tensor in engine.weights())
            saver.save(step + 1)
            for _ in range(every):
                train()
            saver.wait()
            answer |= _restore(saver, engine, expected=saved_at)
        barrier()
        if context.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    return answer


def _restore(saver: Saver, engine: Engine, *, expected: str) -> CaseAnswer:
    """Restore the newest checkpoint, from the disk and not from what the system remembers of it.

    Raises:
        JobError: the weights are not those that were there when it was saved.
    """
    started = time.perf_counter()
    folder = saver.restore()
    restore_s = time.perf_counter() - started
    if tensors_digest(tensor for _, tensor in engine.weights()) != expected:
        raise JobError(f"{folder} does not restore the weights that were there when it was saved")
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"restore_s": restore_s, "checkpoint_bytes": num_bytes}


def drop_page_cache(folder: Path) -> None:
    """Drop the page cache of a folder's files, which are already on disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def fold_ranks(answers: Sequence[CaseAnswer]) -> Numbers:
    """Combine the ranks' answers for a loop; each time is that of the slowest rank."""
    found = {"loop_s": max(answer["loop_s"] for answer in answers)}
    steps = [max(by_rank) for by_rank in zip(*(answer["steps_s"] for answer in answers), strict=True)]
    beside = [any(by_rank) for by_rank in zip(*(answer["beside"] for answer in answers), strict=True)]
    for key, chosen in (("step_s", False), ("step_beside_s", True)):
        if taken := [step_s for step_s, is_beside in zip(steps, beside, strict=True) if is_beside == chosen]:
            found[key] = statistics.median(taken)
    if "restore_s" in answers[0]:
        stalls = [max(by_rank) for by_rank in zip(*(answer["stalls_s"] for answer in answers), strict=True)]
        num_bytes, durable_s = answers[0]["checkpoint_bytes"], statistics.median(answers[0]["durable_s"])
        found |= {
            "stall_s": statistics.median(stalls),
            "durable_s": durable_s,
            "checkpoint_bytes": num_bytes,
            "written_mb_per_s": num_bytes / durable_s / 1e6,
            "restore_s": max(answer["restore_s"] for answer in answers),
        }
    return found


def checkpoint_report(benchmark: CheckpointBenchmark, found: Mapping[str, Sequence[CaseRun]]) -> BenchmarkResults:
    """Return the findings of all modes."""
    added, ratios = _added(benchmark, found), _step_ratios(found)
    cases = [
        BenchmarkCase(
            name=mode,
            samples={
                key: tuple(taken.numbers[key] for taken in rounds)
                for key in rounds[0].numbers
                if all(key in taken.numbers for taken in rounds)  # a save may be done before the next step begins
            }
            | ({"added_per_save_s": added[mode]} if mode in added else {})
            | ({"step_beside_ratio": ratios[mode]} if mode in ratios else {}),
        )
        for mode, rounds in found.items()
    ]
    return BenchmarkResults(
        benchmark=benchmark,
        cases=cases,
        facts={mode: {"rounds": [list(taken.answers) for taken in rounds]} for mode, rounds in found.items()},
        findings=tuple(_findings(cases)),
        metrics={f"{case.name}/{key}": case.median(key) for case in cases for key in case.samples},
    )


def _added(benchmark: CheckpointBenchmark, found: Mapping[str, Sequence[CaseRun]]) -> dict[str, tuple[float, ...]]:
    """Return the time that a save added in each round: blocked, and in slower steps."""
    if NO_SAVING not in found:
        return {}
    plain = [taken.numbers["loop_s"] for taken in found[NO_SAVING]]
    return {
        mode: tuple(
            (taken.numbers["loop_s"] - before) / benchmark.saves for taken, before in zip(rounds, plain, strict=True)
        )
        for mode, rounds in found.items()
        if mode != NO_SAVING
    }


def _step_ratios(found: Mapping[str, Sequence[CaseRun]]) -> dict[str, tuple[float, ...]]:
    """Return how much longer a step beside a save takes than one without saves, by round."""
    if NO_SAVING not in found:
        return {}
    plain = [taken.numbers["step_s"] for taken in found[NO_SAVING]]
    return {
        mode: tuple(taken.numbers["step_beside_s"] / step_s for taken, step_s in zip(rounds, plain, strict=True))
        for mode, rounds in found.items()
        if all("step_beside_s" in taken.numbers for taken in rounds)
    }


def _findings(cases: Sequence[BenchmarkCase]) -> Iterator[str]:
    for case in cases:
        of = case.samples
        if case.name == NO_SAVING:
            continue
        yield f"{case.name}: training pauses for {spread('stall_s', of['stall_s'])} s a save"
        if "added_per_save_s" in of:
            yield f"{case.name}: the loop is longer by {spread('added_per_save_s', of['added_per_save_s'])} s a save"
        if "step_beside_ratio" in of:
            ratio = spread("step_beside_ratio", of["step_beside_ratio"])
            yield f"{case.name}: a step beside a save takes {ratio} times as long as one without saves"
        yield (
            f"{case.name}: {case.median('checkpoint_bytes'):,.0f} bytes on the disk after "
            f"{case.median('durable_s'):.3f} s, {case.median('written_mb_per_s'):,.0f} MB/s; "
            f"restored in {case.median('restore_s'):.3f} s, weights equal bit for bit"
        )
    stalls = {case.name: case.median("stall_s") for case in cases if case.name != NO_SAVING}
    if {"async", "disabled"} <= stalls.keys():
        yield f"async pauses for {stalls['async'] / stalls['disabled']:.3f} of the time of disabled"
    if peers := [name for name in stalls if name in ("dcp_save", "dcp_async_save", "deepspeed")]:
        yield f"{', '.join(peers)}: without checksums, manifest and rename, which the others include"
