"""What ``profile=true`` left: tables of operators, memory over time, and where the traces are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.files import read_json
from launcher.report.chart import COLOURS, Line, chart
from launcher.report.markdown import render_markdown
from launcher.report.markup import Html, element, section
from launcher.rundir import RunDir

_TABLES, _MEMORY, _TRACE = ".operators.md", ".memory.json", ".trace.json.gz"


def profiles_of(run_dir: RunDir) -> Html:
    """Return the profiles of all processes of a run, those of a server inside a benchmark included."""
    folders = (run_dir.profile, RunDir(run_dir.path / "server").profile)
    return section("Profile", [list(_profiles(folder)) for folder in folders if folder.is_dir()])


def _profiles(folder: Path) -> Iterator[Html]:
    for tables in sorted(folder.glob(f"*{_TABLES}")):
        name = tables.name.removesuffix(_TABLES)
        yield render_markdown(tables.read_text(encoding="utf-8"))
        memory, trace = folder / f"{name}{_MEMORY}", folder / f"{name}{_TRACE}"
        if memory.is_file():
            yield from _memory(read_json(memory))
        if trace.is_file():
            yield element("p", "trace, for ui.perfetto.dev or chrome://tracing: ", element("code", str(trace)))


def _memory(by_device: Mapping[str, Any]) -> Iterator[Html]:
    for device, found in by_device.items():
        points = [(float(at), float(used)) for at, used in found["timeline"]]
        line = Line(name="bytes more than at the beginning", points=points, colour=COLOURS[0])
        yield chart(f"memory of {device} while it was recorded", [line], along="second")
