"""What ``profile=true`` left: tables of operators, memory over time, and where the traces are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.report.chart import COLOURS, Line, chart
from launcher.report.markdown import render_markdown
from launcher.report.markup import Html, element, section
from launcher.rundir import RunDir
from launcher.runfiles import is_regular, read_object, read_regular

_MOST_TEXT = 8 << 20
_TABLES, _MEMORY, _TRACE = ".operators.md", ".memory.json", ".trace.json.gz"


def profiles_of(run_dir: RunDir) -> Html:
    """Return the profiles of all processes of a run, those of a server inside a benchmark included."""
    folders = (run_dir.profile, RunDir(run_dir.path / "server").profile)
    return section(
        "Profile", [list(_profiles(folder, inside=run_dir.path)) for folder in folders if _is_own(folder, run_dir)]
    )


def _is_own(folder: Path, run_dir: RunDir) -> bool:
    """Return whether a folder of the run is there and is not a link to a folder elsewhere."""
    return folder.is_dir() and folder.resolve() == run_dir.path.resolve() / folder.relative_to(run_dir.path)


def _profiles(folder: Path, *, inside: Path) -> Iterator[Html]:
    for tables in sorted(folder.glob(f"*{_TABLES}")):
        name = tables.name.removesuffix(_TABLES)
        yield render_markdown(read_regular(tables, inside=inside, limit=_MOST_TEXT).decode("utf-8", errors="replace"))
        memory, trace = folder / f"{name}{_MEMORY}", folder / f"{name}{_TRACE}"
        if is_regular(memory):
            yield from _memory(read_object(memory, inside=inside))
        if is_regular(trace):
            yield element("p", "trace, for ui.perfetto.dev or chrome://tracing: ", element("code", str(trace)))


def _memory(by_device: Mapping[str, Any]) -> Iterator[Html]:
    for device, found in by_device.items():
        points = [(float(at), float(used)) for at, used in found["timeline"]]
        line = Line(name="bytes more than at the beginning", points=points, colour=COLOURS[0])
        yield chart(f"memory of {device} while it was recorded", [line], along="second")
