"""The processes of one run on all hosts, found by a mark that they inherit, also through ssh."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "LC_FAULTS"
"""An environment variable that sshd lets through: its default configuration accepts LC_*."""
_STARTERS = ("torch.distributed.run", "launcher.jobs.torchrun", "bin/torchrun", "deepspeed.launcher.launch")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A living process, as this machine sees it."""

    pid: int
    started: int
    """Clock ticks since the boot: a later process with the same number is another."""
    parent: int
    network: str
    """Name of its network namespace: which host it is on."""
    mark: str
    rank: int | None
    """What RANK said when its program was started."""
    program: str
    command: str

    @property
    def key(self) -> tuple[int, int]:
        """What no other process ever has."""
        return self.pid, self.started


def marked(mark: str) -> list[Seen]:
    """Return the living processes with that mark."""
    return [seen for seen in _all() if seen.mark == mark]


def unmarked(pids: Iterable[int]) -> list[Seen]:
    """Return those of ``pids`` that live and have lost, or never had, a mark."""
    return [seen for seen in _all(pids) if not seen.mark]


def find(processes: Sequence[Seen], role: str, *, rank: int) -> Seen:
    """Return the rank, or the ``agent`` or ``torchrun`` on its host.

    Raises:
        LookupError: it is not there.
    """
    by_pid = {seen.pid: seen for seen in processes}
    ranks = [seen for seen in processes if seen.rank == rank]
    parents = {seen.parent for seen in ranks}  # a rank monitor and its rank are forks of one program
    victim = next((seen for seen in ranks if seen.pid not in parents), None)
    if victim is None:
        raise LookupError(f"rank {rank} is not there")
    if role == "rank":
        return victim
    for seen in processes:
        if seen.network != victim.network or not seen.program.startswith("python"):
            continue
        if role == "torchrun" and any(starter in seen.command for starter in _STARTERS):
            return seen
        parent = by_pid.get(seen.parent)
        is_forked = (
            parent is not None and parent.command == seen.command
        )  # by its agent supervisor, which has the same command line
        if role == "agent" and (
            "supervision.agent_entry" in seen.command or ("supervision.agent_supervisor" in seen.command and is_forked)
        ):
            return seen
    raise LookupError(f"no {role} beside rank {rank}")


def kill_marked(mark: str, *, within_s: float = 20.0) -> None:
    """Kill every process with that mark.

    Raises:
        TimeoutError: they do not end.
    """
    deadline = time.monotonic() + within_s
    while left := marked(mark):
        for seen in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(seen.pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes do not end: {left}")
        time.sleep(0.05)


def network_of(pid: int) -> str:
    """Return the name of a process's network namespace; empty once it is gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""


def _all(pids: Iterable[int] | None = None) -> Iterator[Seen]:
    numbers = (int(name) for name in os.listdir("/proc") if name.isdigit()) if pids is None else pids  # noqa: PTH208
    for pid in numbers:
        with contextlib.suppress(OSError):  # it has ended
            if (seen := _look(Path(f"/proc/{pid}"))) is not None:
                yield seen


def _look(entry: Path) -> Seen | None:
    environ = dict(word.partition(b"=")[::2] for word in (entry / "environ").read_bytes().split(b"\0"))
    stat = (entry / "stat").read_text()
    state, parent, *rest = stat[stat.rindex(")") + 2 :].split()
    if state in "ZX":
        return None
    rank = environ.get(b"RANK", b"").decode()
    return Seen(
        pid=int(entry.name),
        started=int(rest[17]),
        parent=int(parent),
        network=network_of(int(entry.name)),
        mark=environ.get(MARK.encode(), b"").decode(),
        rank=int(rank) if rank.isdigit() else None,
        program=(entry / "exe").readlink().name,
        command=(entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip(),
    )
