"""One recording by torch's profiler and its files; torch is imported when it starts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.utils.files import write_atomic, write_json
from launcher.utils.text import bytes_text, format_table

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from launcher.config.profile import TorchProfile


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
        """Start the profiler without recording, so that ``start`` is fast."""
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
            acc_events=True,  # there is one recording: without, torch 2.11 warns that each replaces the one before
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
        """Return a context whose work is one named range of the trace."""
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
        from launcher.profiling.memory import memory_timeline

        operators = operator_averages(self._torch.key_averages(group_by_input_shape=self._options.shapes))
        memory = memory_timeline(events) if self._options.memory else {}
        if memory:
            write_json(self.folder / f"{self.name}.memory.json", memory)
        top = self._options.top
        write_atomic(self.folder / f"{self.name}.operators.txt", as_text(operators, top=top))
        write_atomic(
            self.folder / f"{self.name}.operators.md", as_markdown(self.name, operators, memory=memory, top=top)
        )


OperatorKind = Literal["operator", "kernel", "range"]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator, kernel or named range, all its calls together. Times are seconds."""

    name: str
    sort: OperatorKind
    calls: int
    self_s: float
    """Seconds on the CPU, without its callees."""
    total_s: float
    """Seconds on the CPU, with its callees."""
    device_s: float
    """On the GPU: of a kernel, its own; of an operator, that of the kernels it launched itself."""
    self_bytes: int
    """Bytes allocated less bytes released, without its callees."""
    shapes: str = ""
    """Shapes of the inputs, if operators are listed by them."""


def operator_averages(averages: Iterable[Any]) -> list[Operator]:
    """Return torch's averages, without operators that take no time."""
    found = [_operator(average) for average in averages]
    return [operator for operator in found if operator.total_s or operator.device_s]


def _operator(average: Any) -> Operator:
    from torch.autograd import DeviceType

    on_cpu = average.device_type == DeviceType.CPU
    kind: OperatorKind = "range" if average.is_user_annotation else "operator" if on_cpu else "kernel"
    return Operator(
        name=str(average.key),
        sort=kind,
        calls=int(average.count),
        self_s=average.self_cpu_time_total / 1e6,
        total_s=average.cpu_time_total / 1e6,
        device_s=average.self_device_time_total / 1e6,
        self_bytes=int(average.self_device_memory_usage or average.self_cpu_memory_usage),
        shapes=" ".join(map(_shape, average.input_shapes or ())),
    )


def _shape(sizes: Any) -> str:
    return "×".join(map(str, sizes)) if sizes else "-"


_TITLES: Mapping[OperatorKind, str] = {"operator": "Operators", "kernel": "Kernels", "range": "Named ranges"}
_CPU_TEXT, _GPU_TEXT = "self CPU", "self GPU"


def as_text(operators: Sequence[Operator], *, top: int) -> str:
    """Return the operators that take longest as aligned text."""
    return "\n".join(format_table(list(_rows(_top(operators, "operator", top), operators)))) + "\n"


def as_markdown(name: str, operators: Sequence[Operator], *, memory: Mapping[str, Any], top: int) -> str:
    """Return all tables of one process.

    Args:
        name: of the process.
        operators: all of them.
        memory: as ``memory_of`` returns it.
        top: rows of a table.
    """
    lines = [f"# Profile of {name}"]
    for sort, title in _TITLES.items():
        chosen = _top(operators, sort, top)
        if chosen:
            lines += ["", f"## {title}", "", *_markdown(list(_rows(chosen, operators)))]
    for device, found in memory.items():
        held = [(row["operator"], str(row["blocks"]), bytes_text(row["bytes"])) for row in found["held_at_peak"]]
        peak = f"{bytes_text(found['peak_bytes'])} more than at the beginning, after {found['peak_at_s']:.3f} s"
        lines += ["", f"## Memory of {device} at its peak", "", f"{peak}; allocated by:", ""]
        lines += _markdown([("operator", "blocks", "bytes"), *held])
    return "\n".join(lines) + "\n"


def _top(operators: Sequence[Operator], sort: OperatorKind, top: int) -> list[Operator]:
    """Return those of a sort that take longest themselves: on the GPU where there is one."""
    found = [operator for operator in operators if operator.sort == sort]
    if sort == "range":
        return sorted(found, key=lambda operator: -operator.total_s)[:top]
    on_device = any(operator.device_s for operator in operators)
    return sorted(found, key=lambda operator: -(operator.device_s if on_device else operator.self_s))[:top]


def _rows(chosen: Sequence[Operator], operators: Sequence[Operator]) -> Iterator[tuple[str, ...]]:
    """Yield a head and a row for each; shares are of what all operators take together."""
    on_device = any(operator.device_s for operator in operators)
    has_shapes = any(operator.shapes for operator in chosen)
    own = [operator for operator in operators if operator.sort == "operator"]
    all_s, all_device_s = sum(one.self_s for one in own) or 1.0, sum(one.device_s for one in own) or 1.0
    head = [chosen[0].sort if chosen else "operator", "calls", _CPU_TEXT, "share", "CPU with calls"]
    yield tuple(head + ([_GPU_TEXT, "share"] if on_device else []) + ["memory"] + (["shapes"] if has_shapes else []))
    for one in chosen:
        cells = [one.name, str(one.calls), _ms(one.self_s), f"{one.self_s / all_s:.1%}", _ms(one.total_s)]
        cells += [_ms(one.device_s), f"{one.device_s / all_device_s:.1%}"] if on_device else []
        cells += [_signed(one.self_bytes)]
        yield tuple(cells + ([one.shapes] if has_shapes else []))


def _markdown(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    head, *body = rows
    yield _row(head)
    yield _row(["---"] * len(head))
    yield from map(_row, body)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.3f} ms"


def _signed(count: int) -> str:
    return f"-{bytes_text(-count)}" if count < 0 else bytes_text(count)
