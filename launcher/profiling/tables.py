"""A profile as tables, for terminals and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.profiling.operators import Operator, Sort
from launcher.table import table
from launcher.wording import bytes_text

_TITLES: Mapping[Sort, str] = {"operator": "Operators", "kernel": "Kernels", "stretch": "Stretches of the work"}
_CPU_TEXT, _GPU_TEXT = "self CPU", "self GPU"


def as_text(operators: Sequence[Operator], *, top: int) -> str:
    """Return the operators that take longest as aligned text."""
    return "\n".join(table(list(_rows(_top(operators, "operator", top), operators)))) + "\n"


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


def _top(operators: Sequence[Operator], sort: Sort, top: int) -> list[Operator]:
    """Return those of a sort that take longest themselves: on the GPU where there is one."""
    found = [operator for operator in operators if operator.sort == sort]
    if sort == "stretch":
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
