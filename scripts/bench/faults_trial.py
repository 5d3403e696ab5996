"""One cell of the fault matrix, carried out: a run, a neighbour beside it, the fault, and what came of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from faults_cells import NUM_RANKS_ALONE, Cell
from faults_lab import Hosts, Lab
from faults_named import named_by_deepspeed, named_by_ours, named_by_torchrun
from faults_processes import find, unmarked
from faults_run import Run, StartTroubleError
from faults_start import Job

SURVIVORS_AFTER_S = 10.0
GIVE_UP_S = 30.0
_GOES_ON_S = 4.0
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came of a cell."""

    name: str
    survivors: tuple[str, ...]
    """Command lines of what was left after ``SURVIVORS_AFTER_S``."""
    gone_s: float | None
    """Seconds from the fault until nothing was left anywhere; ``None`` after ``GIVE_UP_S``, or when it goes on."""
    exit_code: int | None
    """``None``: the launcher never ended."""
    is_right_code: bool
    named: str
    """Whom the launcher named."""
    is_right_cause: bool
    neighbour: str
    """What happened to the run beside it; empty when nothing did."""
    said: str
    """The end of what the launcher printed."""

    @property
    def is_right(self) -> bool:
        """Whether everything was as it has to be."""
        return self.is_right_code and self.is_right_cause and not self.survivors and not self.neighbour


class Worker:
    """Carries out cells one after the other, on hosts of its own.

    Args:
        number: sets its ports apart from those of other workers.
        folder: for the directories of its runs.
    """

    def __init__(self, number: int, folder: Path) -> None:
        self._folder = folder / str(number)
        self._ports = itertools.cycle(range(20000 + number * 1000, 20990 + number * 1000))
        self._hosts = Hosts()
        self._neighbour: Run | None = None
        self._neighbour_of: tuple[object, ...] = ()
        self._num_runs = itertools.count(1)

    def carry_out(self, cell: Cell) -> Found:
        """Carry out one cell.

        Raises:
            StartTroubleError: the run, or its neighbour, never began to work.
        """
        lab = self._hosts.lab() if cell.num_hosts > 1 else None
        hosts = lab.names[: cell.num_hosts] if lab else ["box"]
        unharmed = [name for number, name in enumerate(hosts) if cell.target != "host" or number != cell.host]
        try:
            neighbour = self._neighbour_on(cell, lab, unharmed)
            with self._start(cell.launcher, cell.variant, lab, hosts) as run:
                for each in (neighbour, run):
                    each.wait_until_working()
                found = self._strike(cell, run, neighbour)
        except BaseException:
            self._forget_neighbour()
            raise
        else:
            if found.is_right:
                shutil.rmtree(run.job.folder)
            return found
        finally:
            if cell.target == "host":
                self._forget_neighbour()
                self._hosts.break_down()

    def _strike(self, cell: Cell, run: Run, neighbour: Run) -> Found:
        known, printed = {seen.key for seen in neighbour.processes()}, run.output_bytes()
        victim = None
        if cell.target == "parent":
            victim = run.process.pid
        elif cell.target != "host":
            victim = find(run.processes(), cell.target, rank=cell.rank).pid
        struck = time.monotonic()
        if victim is not None and cell.signal is not None:
            os.kill(victim, cell.signal)
        else:
            self._hosts.strike(run.job.hosts[cell.host], cell.how)
        if cell.goes_on:
            return self._see_it_go_on(cell, run, neighbour, known)
        gone_s, survivors = self._watch(run, struck)
        if gone_s is not None:
            run.wait()  # the kernel takes a process from /proc/PID/environ before it has an exit code
        code, said = run.exit_code(), run.said(after=printed, num_lines=None)
        match cell.launcher:
            case "ours":
                named, is_right_cause = named_by_ours(cell, run)
            case "torchrun":
                named, is_right_cause = named_by_torchrun(cell, run, said)
            case _:
                named, is_right_cause = named_by_deepspeed(cell, run, said)
        return Found(
            name=cell.name,
            survivors=survivors,
            gone_s=gone_s,
            exit_code=code,
            is_right_code=cell.is_right_code(code),
            named=named,
            is_right_cause=is_right_cause,
            neighbour=self._harm_to(neighbour, known),
            said=run.said(),
        )

    def _watch(self, run: Run, struck: float) -> tuple[float | None, tuple[str, ...]]:
        """Wait until nothing is left; return when that was, and what was there when it should have been gone."""
        survivors: tuple[str, ...] | None = None
        while True:
            left, since = self._left_of(run), time.monotonic() - struck
            if survivors is None and (since >= SURVIVORS_AFTER_S or not left):
                survivors = tuple(left)
            if not left:
                return round(since, 2), survivors or ()
            if since > GIVE_UP_S:
                return None, survivors or ()
            time.sleep(_POLL_S)

    def _left_of(self, run: Run) -> list[str]:
        """Return the processes that are left of it, and any unexpected ones on its hosts."""
        left = run.processes()
        for name in run.job.hosts if run.job.lab else ():
            left += unmarked(run.job.lab.processes(name)) if run.job.lab else []
        return [f"{seen.pid} {seen.command}" for seen in left]

    def _see_it_go_on(self, cell: Cell, run: Run, neighbour: Run, known: set[tuple[int, int]]) -> Found:
        """Take it for right when the run is as it was, and for a wrong ending otherwise."""
        time.sleep(_GOES_ON_S)
        try:
            run.wait_until_working()
            named = "goes on, as it has to"
        except StartTroubleError as trouble:
            named = str(trouble)
        is_on = run.exit_code() is None
        return Found(
            name=cell.name,
            survivors=(),
            gone_s=None,
            exit_code=run.exit_code(),
            is_right_code=is_on,
            named=named,
            is_right_cause=is_on,
            neighbour=self._harm_to(neighbour, known),
            said=run.said(),
        )

    def _harm_to(self, neighbour: Run, known: set[tuple[int, int]]) -> str:
        """Return what happened to the run beside it."""
        missing = known - {seen.key for seen in neighbour.processes()}
        if missing:
            harm = f"{len(missing)} of its {len(known)} processes are gone: {neighbour.said()}"
        else:
            try:
                neighbour.wait_until_working()
            except StartTroubleError as trouble:
                harm = str(trouble)
            else:
                return ""
        self._forget_neighbour()
        return harm

    def _neighbour_on(self, cell: Cell, lab: Lab | None, hosts: Sequence[str]) -> Run:
        """Return a run on these hosts, started by the same launcher; the one of the cell before where it fits."""
        wanted = (cell.launcher, *hosts)
        if self._neighbour is None or self._neighbour_of != wanted:
            self._forget_neighbour()
            self._neighbour, self._neighbour_of = self._start(cell.launcher, "has a child", lab, hosts), wanted
        return self._neighbour

    def _forget_neighbour(self) -> None:
        if self._neighbour is not None:
            self._neighbour.end()
            shutil.rmtree(self._neighbour.job.folder, ignore_errors=True)
            self._neighbour = None

    def _start(self, launcher: str, variant: str, lab: Lab | None, hosts: Sequence[str]) -> Run:
        num_ranks = len(hosts) if lab else NUM_RANKS_ALONE
        folder = self._folder / str(next(self._num_runs))
        port = next(port for port in self._ports if lab or _is_free(port))
        return Run(launcher, Job(folder=folder, variant=variant, port=port, lab=lab, hosts=hosts, num_ranks=num_ranks))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget_neighbour()
        with contextlib.suppress(OSError):  # what went wrong is in it
            self._folder.rmdir()
        self._hosts.__exit__()


def _is_free(port: int) -> bool:
    """Return whether the port is free on this machine."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("", port))
        return True
    return False


def tree_of(found: Found) -> dict[str, object]:
    """Return what to write down."""
    return {**asdict(found), "is_right": found.is_right}
