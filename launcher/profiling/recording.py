"""One recording by torch's profiler and the files it leaves; torch is imported when it begins, not before."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.files import write_atomic, write_json

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from launcher.profile import TorchProfile

_MOST_BLOCKS = 100_000
"""Allocations and releases that the snapshot of a GPU holds at most; the last ones stay."""
_LEVEL = 4
"""Of compression: a trace shrinks to a tenth with any of them."""


class Recording:
    """Prepared, started, stopped: once each, in this order.

    Args:
        options: what is recorded.
        folder: where files go.
        name: with which they begin.
    """

    def __init__(self, options: TorchProfile, *, folder: Path, name: str) -> None:
        self._options, self.folder, self.name = options, folder, name
        self._torch: Any = None
        self._snapshots = False
        self.is_on = False
        """Whether it listens now."""

    def prepare(self) -> None:
        """Switch the profiler on without listening: what is slow about that is over when ``start`` comes."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._snapshots = self._options.memory and torch.cuda.is_available()
        self._torch = profile(
            activities=activities,
            record_shapes=self._options.shapes,
            profile_memory=self._options.memory,
            acc_events=True,  # there is one stretch: without, torch 2.11 warns that each replaces the one before
        )
        self._torch.prepare_trace()

    def start(self) -> None:
        """Listen from here on."""
        if self._torch is None:
            self.prepare()
        if self._snapshots:
            import torch

            torch.cuda.memory._record_memory_history(max_entries=_MOST_BLOCKS, stacks="python")  # noqa: SLF001 (documented, and there is no other)
        self._torch.start_trace()
        self.is_on = True

    def cancel(self) -> None:
        """Switch off what was prepared and never started."""
        if self._torch is not None:
            self._torch.start_trace()  # one that is only prepared cannot be stopped
            self._torch.stop_trace()
            self._torch = None

    def mark(self, name: str) -> AbstractContextManager[None]:
        """Return what names a stretch of the trace."""
        from torch.profiler import record_function

        named: AbstractContextManager[None] = record_function(name)
        return named

    def stop(self) -> None:
        """Stop listening and write trace, tables and memory."""
        self._torch.stop_trace()
        self.is_on = False
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._snapshots:
            self._keep_snapshot()
        events = self._keep_trace()
        self._keep_tables(events)
        self._torch = None  # what it holds is many times the size of its files

    def _keep_trace(self) -> list[dict[str, Any]]:
        """Write the Chrome trace and return its events."""
        plain = self.folder / f".{self.name}.trace.json"
        try:
            self._torch.export_chrome_trace(str(plain))
            data = plain.read_bytes()
        finally:
            plain.unlink(missing_ok=True)
        write_atomic(self.folder / f"{self.name}.trace.json.gz", gzip.compress(data, _LEVEL))
        events: list[dict[str, Any]] = json.loads(data)["traceEvents"]
        return events

    def _keep_snapshot(self) -> None:
        import torch

        torch.cuda.memory._dump_snapshot(str(self.folder / f"{self.name}.memory.pickle"))  # noqa: SLF001
        torch.cuda.memory._record_memory_history(enabled=None)  # noqa: SLF001

    def _keep_tables(self, events: list[dict[str, Any]]) -> None:
        from launcher.profiling.memory import memory_of
        from launcher.profiling.operators import operators_of
        from launcher.profiling.tables import as_markdown, as_text

        operators = operators_of(self._torch.key_averages(group_by_input_shape=self._options.shapes))
        memory = memory_of(events) if self._options.memory else {}
        if memory:
            write_json(self.folder / f"{self.name}.memory.json", memory)
        top = self._options.top
        write_atomic(self.folder / f"{self.name}.operators.txt", as_text(operators, top=top))
        write_atomic(
            self.folder / f"{self.name}.operators.md", as_markdown(self.name, operators, memory=memory, top=top)
        )
