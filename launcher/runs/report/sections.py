"""What the report of one run shows, part by part; a part that is ``None`` is left out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigError
from launcher.protocol.plan import Plan, plan_from_json
from launcher.protocol.results import read_metrics
from launcher.protocol.rundir import RunDir
from launcher.runs.checkpoints import kept_checkpoints
from launcher.runs.report.charts import COLOURS, MOST_METRICS, Series, chart
from launcher.runs.report.html import png_image, render_macro, render_markdown
from launcher.runs.state import RunState, continue_command
from launcher.utils.files import is_regular, open_regular, read_object, read_regular
from launcher.utils.text import counted, duration_text, shell_word

if TYPE_CHECKING:
    from markupsafe import Markup

_LARGEST_PICTURE = 8 << 20
_MOST_TEXT = 200_000
"""Limit of a text file, in bytes."""


def facts_of(state: RunState) -> list[tuple[str, Any]]:
    """Return the run's summary, its outcome, and the command to run it again."""
    folder = shell_word(str(state.run_dir.path))
    kept = kept_checkpoints(state.run_dir)
    slots, command = state.slots, continue_command(state) if state.is_over else None
    facts: dict[str, Any] = {
        "status": render_macro("badge", state.status),
        "exit code": state.exit_code,
        "job": state.plan.get("job"),
        "steps": f"{state.step or 0} of {state.num_steps}" if state.num_steps else None,
        "ranks": f"{sum(slots)} on {counted(len(slots), 'host')}, backend {state.backend}" if slots else None,
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.started_at)),
        "took": duration_text(state.ended_at - state.started_at) if state.ended_at else None,
        "checkpoints": str(kept) if kept else None,
        "directory": render_macro("code", str(state.run_dir.path)),
        "again": render_macro("code", f"launch rerun {folder}"),
        "continue": render_macro("code", command) if command else None,
    }
    return [(key, value) for key, value in facts.items() if value is not None]


def failure_of(state: RunState) -> dict[str, Any] | None:
    """Return the cause of a failure, the victims, and the position of every rank."""
    failure = state.failure
    if not failure or state.status not in ("failed", "cancelled", "preempted"):
        return None
    who = ("host", "rank", "exit_code", "signal", "log")
    victims, ranks = (_objects(failure.get(key)) for key in ("victims", "ranks"))
    records = {"ranks that ended because of it": _records(victims), "where the ranks were": _records(ranks)}
    return {
        **{key: failure.get(key, "") for key in ("reason", "error", "traceback")},
        "facts": [(key.replace("_", " "), str(failure[key])) for key in who if failure.get(key) not in (None, "")],
        "records": {title: table for title, table in records.items() if table[1]},
    }


def findings_of(run_dir: RunDir) -> list[Markup] | None:
    """Return the tables that the job wrote in Markdown, and its pictures.

    Loss curves are drawn from the metrics instead.
    """
    pages = [render_markdown(_text(path)) for path in sorted(run_dir.path.glob("*.md")) if is_regular(path)]
    pictures = [path for path in sorted(run_dir.path.glob("*.png")) if path != run_dir.curve and is_regular(path)]
    small = [path for path in pictures if path.lstat().st_size <= _LARGEST_PICTURE]
    return [*pages, *(png_image(path, limit=_LARGEST_PICTURE) for path in small)] or None


def sample_of(run_dir: RunDir) -> str | None:
    """Return the text that the model wrote at the end."""
    return _text(run_dir.sample) if is_regular(run_dir.sample) else None


def samples_of(run_dir: RunDir) -> dict[str, list[tuple[str, str]]] | None:
    """Return step and text of each sample that was generated at evaluations, by prompt."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in read_metrics(run_dir.samples, limit=MOST_METRICS):
        prompt, text = line.get("prompt"), line.get("text")
        if isinstance(prompt, str) and isinstance(text, str):
            found.setdefault(prompt, []).append((str(line.get("train/step", "")), text))
    return found or None


def metrics_of(state: RunState) -> list[tuple[str, str]] | None:
    """Return the last value of each metric."""
    last: dict[str, Any] = {}
    for line in read_metrics(state.run_dir.metrics, limit=MOST_METRICS):
        last.update(line)
    last.pop("time", None)
    return [(name, number_text(value)) for name, value in last.items()] or None


def plan_of(run_dir: RunDir, *, render_plan: Callable[[Plan], str]) -> str | None:
    """Return the plan as ``launch plan`` prints it; of another version, the file as it is."""
    if not is_regular(run_dir.plan):
        return None
    try:
        return render_plan(plan_from_json(read_object(run_dir.plan)))
    except (ConfigError, ValueError):
        return _text(run_dir.plan)


def config_of(run_dir: RunDir) -> str:
    """Return the whole configuration."""
    return _text(run_dir.snapshot)


def environment_of(state: RunState) -> list[tuple[str, str]] | None:
    """Return the versions recorded by rank 0, and the hosts of the plan."""
    found = known_environment(state.run_dir)
    devices = {host["name"]: ", ".join(host.get("devices") or ["CPU"]) for host in state.hosts}
    return [*found.items(), *((f"devices of {name}", text) for name, text in devices.items())] or None


def known_environment(run_dir: RunDir) -> Mapping[str, str]:
    """Return machine and versions; empty if they are not recorded."""
    try:
        return {key: str(value) for key, value in read_object(run_dir.environment).items()}
    except (OSError, ValueError):
        return {}


def events_of(run_dir: RunDir) -> list[tuple[str, str, str]] | None:
    """Return the events with their times."""
    events = list(read_metrics(run_dir.timeline, limit=MOST_METRICS))  # the same format: one object per line
    if not events:
        return None
    began = float(events[0].get("time", 0.0))
    after = [f"{float(event.get('time', 0.0)) - began:,.1f} s" for event in events]
    said = [(str(event.get("host", "")), str(event.get("what", ""))) for event in events]
    return [(at, *words) for at, words in zip(after, said, strict=True)]


def files_of(run_dir: RunDir) -> list[tuple[str, str]]:
    """Return the files of the run with their sizes; checkpoints and W&B's files as folders."""
    return [(name, f"{size:,}" if size is not None else "") for name, size in _files(run_dir.path)]


def _files(folder: Path) -> Iterator[tuple[str, int | None]]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink():  # a link may lead into folders of the reader
            yield f"{path.name} (a symbolic link)", None
        elif path.is_dir() and path.name in ("logs", "profile"):
            yield from ((f"{path.name}/{name}", size) for name, size in _files(path))
        elif path.is_dir():
            yield f"{path.name}/", None
        elif not path.name.startswith("."):
            yield path.name, path.lstat().st_size


def _records(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    return keys, [[str(record.get(key, "")) for key in keys] for record in records]


def number_text(value: Any) -> str:
    """Return a metric's value for a table."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.6g}" if isinstance(value, float) else "not finite" if value is None else str(value)


def _objects(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(path: Path) -> str:
    with open_regular(path) as file:
        data, size = file.read(_MOST_TEXT), os.fstat(file.fileno()).st_size
    text = data.decode("utf-8", errors="replace")
    return text if size <= _MOST_TEXT else f"{text}\n… {size - _MOST_TEXT:,} more bytes"


_MOST_TABLE_BYTES = 8 << 20
_TABLES, _MEMORY, _TRACE = ".operators.md", ".memory.json", ".trace.json.gz"


def profiles_of(run_dir: RunDir) -> list[Markup] | None:
    """Return the profiles of all processes of a run, also of a server in a benchmark."""
    folders = (run_dir.profile, RunDir(run_dir.path / "server").profile)
    inside = [folder for folder in folders if _is_inside(folder, run_dir)]
    return [part for folder in inside for part in _profiles(folder, inside=run_dir.path)] or None


def _is_inside(folder: Path, run_dir: RunDir) -> bool:
    """Return whether a folder of the run exists and is not a link to another place."""
    return folder.is_dir() and folder.resolve() == run_dir.path.resolve() / folder.relative_to(run_dir.path)


def _profiles(folder: Path, *, inside: Path) -> Iterator[Markup]:
    for tables in sorted(folder.glob(f"*{_TABLES}")):
        name = tables.name.removesuffix(_TABLES)
        yield render_markdown(
            read_regular(tables, inside=inside, limit=_MOST_TABLE_BYTES).decode("utf-8", errors="replace")
        )
        memory, trace = folder / f"{name}{_MEMORY}", folder / f"{name}{_TRACE}"
        if is_regular(memory):
            yield from _memory_charts(read_object(memory, inside=inside))
        if is_regular(trace):
            yield render_macro("trace", str(trace))


def _memory_charts(by_device: Mapping[str, Any]) -> Iterator[Markup]:
    for device, found in by_device.items():
        points = [(float(at), float(used)) for at, used in found["timeline"]]
        line = Series(name="bytes more than at the beginning", points=points, colour=COLOURS[0])
        yield chart(f"memory of {device} while it was recorded", [line], along="second")
