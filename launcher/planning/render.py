"""Render a plan as text, with commands to paste into a shell; equal hosts are shown once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence

from launcher.planning.topology import HostGroup, group_hosts
from launcher.protocol.plan import Command, Host, HostPlan, MemoryEstimate, Plan
from launcher.utils.text import bytes_text, counted, format_table, printable, shell_word

_LABEL = 12
_SHELL_WIDTH = 100


def render_plan(plan: Plan, *, submission: str = "") -> str:
    """Return the plan as aligned text; equal plans give equal text.

    Args:
        plan: what to show.
        submission: the backend's own text about how it starts the plan.
    """
    groups = group_hosts(plan.hosts)
    sections = {
        f"Plan {plan.name} · {plan.run_id}": _head(plan),
        "Batch": _batch(plan),
        f"Parts of {plan.job}": format_table(list(plan.details.items())),
        "Model state per rank": _memory(plan.memory, plan.hosts) if plan.summary.model else (),
        "Ranks": _ranks(plan, groups),
        "Commands": _commands(groups),
        f"Submission by {plan.backend}": submission.splitlines(),
        f"Files in {plan.run_dir_on_hosts or plan.run_dir}": plan.files,
        f"Configuration of {plan.summary.engine}": _engine_config(plan),
        "Tracker": _tracker(plan),
        "Warnings": plan.warnings,
    }
    blocks = []
    for title, lines in sections.items():
        body = [f"  {line}".rstrip() for line in lines]
        if body:
            blocks.append("\n".join([title, *body]))
    return printable("\n\n".join(blocks)) + "\n"


def _row(label: str, value: str) -> str:
    return f"{label:{_LABEL}}{value}"


def _head(plan: Plan) -> Iterator[str]:
    yield _row("job", plan.job)
    for field in dataclasses.fields(plan.summary):
        if text := getattr(plan.summary, field.name):
            yield _row(field.name, text)
        if field.name == "model" and plan.memory is not None:
            yield _row("", f"{plan.memory.num_params:,} parameters")


def _batch(plan: Plan) -> Iterator[str]:
    work = plan.work
    if work.batch is None:
        return
    yield _row("sequences", f"{work.batch} a step")
    steps = counted(work.num_steps, "step")
    if not work.total_tokens:
        yield _row("tokens", f"{work.tokens_per_step:,} a step; ranks count the text once it is tokenised")
    elif work.tokens_per_step * work.num_steps == work.total_tokens:
        yield _row("tokens", f"{work.tokens_per_step:,} a step × {steps} = {work.total_tokens:,}")
    else:
        yield _row("tokens", f"{work.tokens_per_step:,} a step, {work.total_tokens:,} in {steps}, the last one partial")


def _memory(memory: MemoryEstimate | None, hosts: Sequence[HostPlan]) -> Iterator[str]:
    if memory is None:
        yield "not known before the model's files are downloaded"
        return
    state, device = memory.per_rank, _device_word(hosts[0].host)
    parts = {"parameters": state.parameters, "gradients": state.gradients, "optimizer": state.optimizer}
    width = max(len(bytes_text(size)) for size in (*parts.values(), state.total))
    for name, size in parts.items():
        yield _row(name, f"{bytes_text(size):>{width}}")
    places = {device: state.device, "host RAM": state.host, "NVMe": state.nvme}
    where = " + ".join(f"{bytes_text(size)} {place}" for place, size in places.items() if size)
    yield _row("total", f"{bytes_text(state.total):>{width}} = {where}")
    on_host = {"RAM": memory.per_host_ram, "NVMe": memory.per_host_nvme}
    shown = " and ".join(f"{bytes_text(size)} of {place}" for place, size in on_host.items() if size)
    if shown:
        yield _row("each host", shown)
    if memory.checkpoint_copies:
        copies = bytes_text(memory.checkpoint_copies)
        yield _row("checkpoint", f"{copies} of host RAM a rank: copies that are written beside the steps")
    yield _row("formula", memory.formula)
    yield _row("besides", "activations, communication buffers and the framework")


def placement_lines(groups: Sequence[HostGroup]) -> Iterator[str]:
    """Yield which ranks run where, hosts alike in one line."""
    for group in groups:
        last = group.last
        from_rank, to_rank = group.first.first_rank, last.first_rank + last.host.slots - 1
        ranks = f"rank {to_rank}" if from_rank == to_rank else f"ranks {from_rank}-{to_rank}"
        yield f"{ranks} on {group.name}: {_room(group.first.host, each=group.size > 1)}"


def _ranks(plan: Plan, groups: Sequence[HostGroup]) -> Iterator[str]:
    degrees = " × ".join(f"{kind} {degree}" for kind, degree in plan.topology.items())
    yield _row("topology", f"{degrees} = {counted(plan.world_size, 'rank')} on {counted(len(plan.hosts), 'host')}")
    yield _row("rendezvous", f"{plan.hosts[0].host.address}:{plan.port}")
    yield from (_row("place", line) for line in placement_lines(groups))


def _room(host: Host, *, each: bool) -> str:
    """Return the resources of a host, and which of them the run uses."""
    slots = f"slots {','.join(map(str, host.slot_ids))}" if host.slot_ids else counted(host.slots, "slot")
    if not host.is_probed:
        return f"{slots}{' each' if each else ''}; cores, memory and devices are probed at the start"
    some = f"{','.join(map(str, host.slot_ids))}" if host.slot_ids else f"{host.slots}"
    devices = f"{some} of {len(host.devices)} × {host.devices[0]}" if host.devices else "CPU"
    return f"{devices}, {'each ' if each else ''}{counted(host.cores, 'core')}, {bytes_text(host.memory_bytes)} RAM"


def _device_word(host: Host) -> str:
    return "GPU" if host.devices else "device (RAM)" if host.is_probed else "device"


def _commands(groups: Sequence[HostGroup]) -> Iterator[str]:
    for group in groups:
        first = group.first
        yield f"{group.name}:"
        if group.size > 1:
            yield f"  # as on {first.host.name}; {', '.join(group.varying)} follow each host's number and name"
        steps = [
            *(("build native ops first", command) for command in first.build_commands),
            ("start the ranks", first.agent_command),
            *(("beside them", command) for command in first.sidecars),
        ]
        for title, command in steps:
            yield f"  # {title}"
            yield from (f"  {line}" for line in shell_lines(command))


def shell_lines(command: Command) -> list[str]:
    """Return the lines of one shell command: variables and argv, joined by backslashes."""
    words = [f"{name}={shell_word(value)}" for name, value in command.env.items()]
    lines = _wrap(words) + _wrap(_with_flags([shell_word(word) for word in command.argv]))
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _with_flags(words: Sequence[str]) -> list[str]:
    """Return ``words`` with each flag joined to its value, so that no line breaks between them."""
    pieces: list[str] = []
    for word in words:
        if pieces and pieces[-1].startswith("-") and " " not in pieces[-1] and not word.startswith("-"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    return pieces


def _wrap(words: Sequence[str]) -> list[str]:
    """Return ``words`` in lines of about _SHELL_WIDTH characters, indented from the second on."""
    lines: list[list[str]] = []
    room = 0
    for word in words:
        room -= len(word) + 1
        if not lines or room < 0:
            lines.append([])
            room = _SHELL_WIDTH - len(word)
        lines[-1].append(word)
    return [("" if number == 0 else "    ") + " ".join(line) for number, line in enumerate(lines)]


def _engine_config(plan: Plan) -> Iterator[str]:
    if plan.engine_config is not None:
        yield from json.dumps(plan.engine_config, indent=2, ensure_ascii=False).splitlines()


def _tracker(plan: Plan) -> Iterator[str]:
    for tracker in plan.tracker.members or (plan.tracker,):
        yield _row(tracker.kind, f"{tracker.mode}: {tracker.reason}")
        if tracker.place:
            yield _row("", tracker.place)
        if tracker.project is not None:
            word = "experiment" if tracker.kind == "mlflow" else "project"
            yield _row("", f"{word} {tracker.project}, group {tracker.group}, run {tracker.run_id}")
    yield _row("always", "metrics.jsonl in the run directory")
