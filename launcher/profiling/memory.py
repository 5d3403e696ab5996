"""Device memory over time, and the operators that hold it at the peak, from a trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

_MAX_POINTS = 300
_MAX_HOLDERS = 12
_ALLOCATION, _OPERATOR = "[memory]", "cpu_op"
_CPU = 0
"""torch's number of the CPU among device types."""
_TOP_LEVEL = "outside of operators"

Event = Mapping[str, Any]


def memory_timeline(events: Iterable[Event]) -> dict[str, Any]:
    """Return by device the bytes in use over time, and those at the peak by operator.

    Bytes are counted from the beginning of the recording: what was there before is not known to it.

    Args:
        events: of a Chrome trace of torch's profiler, with memory.
    """
    events = list(events)
    allocations = [event for event in events if event.get("name") == _ALLOCATION and "Bytes" in event.get("args", {})]
    operators = _operators(events, allocations)
    by_device: dict[str, list[tuple[Event, str]]] = defaultdict(list)
    for event, operator in sorted(zip(allocations, operators, strict=True), key=lambda pair: _ts(pair[0])):
        by_device[_device(event)].append((event, operator))
    return {device: _summary(found) for device, found in sorted(by_device.items())}


def _summary(found: Sequence[tuple[Event, str]]) -> dict[str, Any]:
    began, used = _ts(found[0][0]), 0
    points: list[tuple[float, int]] = []
    for event, _ in found:
        used += event["args"]["Bytes"]
        points.append(((_ts(event) - began) / 1e6, used))
    peak = max(range(len(points)), key=lambda number: points[number][1])
    return {
        "peak_bytes": points[peak][1],
        "peak_at_s": points[peak][0],
        "timeline": [list(point) for point in _thinned(points)],
        "held_at_peak": list(_holders(found[: peak + 1])),
    }


def _holders(found: Iterable[tuple[Event, str]]) -> Iterator[dict[str, Any]]:
    """Yield the operators whose allocations remain after these events, the largest first."""
    blocks: dict[int, tuple[str, int]] = {}
    for event, operator in found:
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0:
            blocks[address] = (operator, size)
        else:
            blocks.pop(address, None)
    held: dict[str, list[int]] = defaultdict(list)
    for operator, size in blocks.values():
        held[operator].append(size)
    largest = sorted(held.items(), key=lambda pair: -sum(pair[1]))[:_MAX_HOLDERS]
    for operator, sizes in largest:
        yield {"operator": operator, "bytes": sum(sizes), "blocks": len(sizes)}


def _operators(events: Iterable[Event], allocations: Sequence[Event]) -> list[str]:
    """Return for each allocation the outermost operator around it, on its thread."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") == _OPERATOR:
            threads[_thread(event)].append(event)
    names: dict[int, str] = {}
    asked = sorted(
        range(len(allocations)), key=lambda number: (str(_thread(allocations[number])), _ts(allocations[number]))
    )
    for _, numbers in groupby(asked, key=lambda number: str(_thread(allocations[number]))):
        order = list(numbers)
        outer = _outermost(threads[_thread(allocations[order[0]])])
        current = next(outer, None)
        for number in order:
            at = _ts(allocations[number])
            while current is not None and _ts(current) + current["dur"] < at:
                current = next(outer, None)
            inside = current is not None and _ts(current) <= at
            names[number] = str(current["name"]) if current is not None and inside else _TOP_LEVEL
    return [names[number] for number in range(len(allocations))]


def _outermost(events: Iterable[Event]) -> Iterator[Event]:
    """Yield the operators of a thread that no other one calls, in order."""
    until = -1.0
    for event in sorted(events, key=lambda event: (_ts(event), -event["dur"])):
        if _ts(event) >= until:
            until = _ts(event) + event["dur"]
            yield event


def _thinned(points: Sequence[tuple[float, int]]) -> Iterator[tuple[float, int]]:
    """Yield points to draw a line: the highest and the last one of each interval."""
    size = -(-2 * len(points) // _MAX_POINTS)
    for start in range(0, len(points), size):
        interval = points[start : start + size]
        highest = max(interval, key=lambda point: point[1])
        yield highest
        if interval[-1] != highest:
            yield interval[-1]


def _device(event: Event) -> str:
    args = event["args"]
    return "cpu" if args["Device Type"] == _CPU else f"gpu {args['Device Id']}"


def _thread(event: Event) -> tuple[Any, Any]:
    return event.get("pid"), event.get("tid")


def _ts(event: Event) -> float:
    return float(event["ts"])
