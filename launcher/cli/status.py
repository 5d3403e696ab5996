"""``launch status``: one run in detail."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.cli.arguments import Arguments
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import ProcessLocation, SessionRecord
from launcher.runs.checkpoints import kept_checkpoints
from launcher.runs.index import find_run
from launcher.runs.logs import host_and_who, tail_lines
from launcher.runs.state import ELSEWHERE, RUNNING, RunState, continue_command, read_run_state
from launcher.utils.text import (
    counted,
    duration_text,
    format_table,
    json_text,
    printable,
    shell_command,
    shell_word,
    short_path,
)

_LIFE = {True: "alive", False: "gone", None: "unknown from this machine"}
_MANY = 16
"""Limit of ranks or agents that the text lists one by one."""


def run(arguments: Arguments) -> int:
    """Print the state of one run."""
    state = read_run_state(find_run(arguments.run, arguments.root))
    cluster = _cluster(state)
    if arguments.json:
        print(json_text({**_tree(state), "cluster": cluster}))
        return 0
    progress = _how_far(state) if cluster is None else _in_cluster(state, cluster)
    print(
        "\n".join(format_table([*_who(state), *progress, *_kept(state), *_ranks(state), *_end(state), *_next(state)]))
    )
    return 0


def _cluster(state: RunState) -> dict[str, Any] | None:
    """Return the state of a run whose files only its pods have; ``None`` for other runs."""
    job = state.cluster_job
    if job is None or state.result:
        return None
    from launcher.backends.kubernetes.cluster_state import read_cluster_state

    return read_cluster_state(job)


def _in_cluster(state: RunState, cluster: dict[str, Any]) -> Iterator[tuple[str, str]]:
    slots, pods, ranks = state.slots, cluster["pods"], cluster["ranks"]
    yield "ranks", f"{sum(slots)} on {counted(len(slots), 'host')}" if slots else "not known"
    yield "cluster", printable(f"{cluster['status']}{cluster['said'] and ': '}{cluster['said']}")
    for pod in pods[:_MANY]:
        said = f": {pod['said']}" if pod["said"] else ""
        yield pod["host"], printable(f"pod {pod['name']} {pod['phase']}{pod['node'] and ' on '}{pod['node']}{said}")
    for said in ranks[:_MANY]:
        yield f"{said['host']}:{said['rank']}", printable(said["line"])
    if (left := max(0, len(pods) - _MANY) + max(0, len(ranks) - _MANY)) > 0:
        yield "…", f"and {left} more: launch status --json"


def _who(state: RunState) -> Iterator[tuple[str, str]]:
    yield "run", f"{state.name} {state.run_id}"
    yield "status", state.status
    yield "directory", str(state.run_dir.path)
    yield from (("damaged", why) for why in state.unreadable_files)
    yield "started", f"{_clock(state.started_at)}, {duration_text(time.time() - state.started_at)} ago"
    where = state.session
    if where is None:
        yield "run by", "not recorded"
        return
    if where.job and not where.invalid_job_names:
        yield "job", f"{where.backend}: {' '.join(f'{key} {value}' for key, value in where.job.items())}"
    elif where.job:
        names = ", ".join(f"{key} {where.job.get(key, '')!r}" for key in where.invalid_job_names)
        yield "job", f"{where.backend}: not known ({names} of session.json is not a valid job name)"
    yield "run by", _process(where.session)
    if len(where.agents) > _MANY:
        counts = Counter(_LIFE[agent.location.is_running()] for agent in where.agents)
        yield "agents", ", ".join(f"{count} {life}" for life, count in counts.items())
        return
    for agent in where.agents:
        login = f" ({agent.ssh_destination})" if agent.ssh_destination else ""
        yield "agent", f"{agent.host}{login}: {_process(agent.location)}"


def _how_far(state: RunState) -> Iterator[tuple[str, str]]:
    slots = state.slots
    yield "ranks", f"{sum(slots)} on {counted(len(slots), 'host')}" if slots else "not known"
    metrics = state.metrics
    if state.step is None:
        yield "progress", "no step yet"
        return
    parts = [] if state.steps_text == "-" else [f"step {state.steps_text}"]
    parts = [f"evaluation {state.steps_text}"] if state.num_steps is None else parts
    parts += [f"loss {metrics['train/loss']:.4f}"] if metrics.get("train/loss") is not None else []
    parts += [f"held-out loss {metrics['eval/loss']:.4f}"] if metrics.get("eval/loss") is not None else []
    parts += [f"{metrics['perf/tokens_per_s']:,.0f} tokens/s"] if metrics.get("perf/tokens_per_s") is not None else []
    if state.status == RUNNING and metrics.get("time"):
        parts.append(f"{duration_text(time.time() - metrics['time'])} ago")
    yield "progress", ", ".join(parts) or "nothing measured yet"


def _kept(state: RunState) -> Iterator[tuple[str, str]]:
    if (kept := kept_checkpoints(state.run_dir)) is not None:
        yield "checkpoints", str(kept)


def _ranks(state: RunState) -> Iterator[tuple[str, str]]:
    last = _last_words(state)
    for said in last[:_MANY]:
        age = duration_text(time.time() - said["written_at"])
        yield f"{said['host']}:{said['rank']}", f"{said['line'] or 'nothing printed'}  ({age} ago)"
    if len(last) > _MANY:
        yield "…", f"and {len(last) - _MANY} more: launch status --json"


def _end(state: RunState) -> Iterator[tuple[str, str]]:
    if state.ended_at is None:
        return
    took = duration_text(state.ended_at - state.started_at)
    yield "ended", f"{_clock(state.ended_at)}, after {took}, exit code {state.exit_code}"
    failure = state.failure
    if failure:
        yield "cause", (str(failure.get("reason", "")).splitlines() or [""])[0]
        yield "log", str(failure.get("log", ""))


def _next(state: RunState) -> Iterator[tuple[str, str]]:
    """Yield the commands one can type now."""
    folder = shell_word(short_path(state.run_dir.path))
    yield "next", f"launch logs {folder}" + ("" if state.is_over else " -f")
    if not state.is_over:
        yield "", f"launch cancel {folder}"
    if state.session and state.status == ELSEWHERE and not state.session.invalid_job_names:
        yield "", shell_command(_asking(state.session))
    if state.is_over and (command := continue_command(state)):
        yield "", command
    if state.is_over:
        yield "", f"launch rerun {folder}"


def _asking(where: SessionRecord) -> list[str]:
    """Return the command that shows the state of its job."""
    job = where.job
    if where.backend == "slurm":
        return ["squeue", f"--jobs={job['id']}"]
    context = [f"--context={job['context']}"] if "context" in job else []
    return ["kubectl", *context, f"--namespace={job['namespace']}", "get", "--", job["kind"], job["name"]]


def _last_words(state: RunState) -> list[dict[str, Any]]:
    """Return the last line of each rank's log and when it was written, by rank."""
    found = []
    for path in state.run_dir.logs.glob("*.log"):
        host, who = host_and_who(path)
        if isinstance(who, int):
            text, written_at = _last_line(path, state.run_dir)
            found.append({"host": host, "rank": who, "line": text, "written_at": written_at})
    return sorted(found, key=lambda said: said["rank"])


def _last_line(path: Path, run_dir: RunDir) -> tuple[str, float]:
    """Return the last line of a log and its time, or why the file is not read."""
    try:
        *_, line = [b"", *(line for line in tail_lines(path, inside=run_dir.path) if line.strip())]
        return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2], path.lstat().st_mtime
    except OSError as error:
        return f"({path.name} {error.strerror})", 0.0


def _tree(state: RunState) -> dict[str, Any]:
    where: SessionRecord | None = state.session
    kept = kept_checkpoints(state.run_dir)
    return {
        "run_id": state.run_id,
        "name": state.name,
        "run_dir": str(state.run_dir.path),
        "status": state.status,
        "exit_code": state.exit_code,
        "started_at": state.started_at,
        "ended_at": state.ended_at,
        "num_steps": state.num_steps,
        "slots": state.slots,
        "metrics": state.metrics,
        "checkpoints": list(kept.steps) if kept else [],
        "best_checkpoint": kept.best.manifest.step if kept and kept.best else None,
        "session": asdict(where) if where else None,
        "ranks": _last_words(state),
        "failure": state.failure,
        "unreadable_files": state.unreadable_files,
    }


def _process(place: ProcessLocation) -> str:
    return f"process {place.pid} on {place.machine}, {_LIFE[place.is_running()]}"


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
