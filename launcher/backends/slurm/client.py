"""Asking Slurm: its own programs, and what they say about the cluster."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.errors import EnvironmentProblem

_TIMEOUT_S = 60.0
_UNLIMITED = ("infinite", "n/a")


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A queue, as sinfo shows it."""

    name: str
    is_default: bool
    limit: str
    num_nodes: int

    @property
    def limit_s(self) -> float:
        """Its time limit in seconds."""
        if self.limit in _UNLIMITED:
            return float("inf")
        days, _, rest = self.limit.rpartition("-")
        seconds = 0
        for part in rest.split(":"):  # from "5:00" up to "1-00:00:00"
            seconds = seconds * 60 + int(part)
        return seconds + int(days or 0) * 86400

    def __str__(self) -> str:
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        return f"{self.name} (up to {self.limit}, {nodes})"


def partitions() -> list[Partition]:
    """Return the queues of the cluster.

    Raises:
        EnvironmentProblem: there is no Slurm here, or it does not answer.
    """
    answer = ask(["sinfo", "--noheader", "--format=%P|%l|%D"])
    if answer.returncode:
        raise EnvironmentProblem(f"Slurm does not answer: {words_of(answer.stderr)}")
    found: dict[str, Partition] = {}
    for line in answer.stdout.splitlines():  # a partition has one line for each time limit and state
        name, limit, num_nodes = line.strip().split("|")
        own, so_far = name.rstrip("*"), found.get(name)
        count = int(num_nodes) + (so_far.num_nodes if so_far else 0)
        found[name] = Partition(name=own, is_default=name.endswith("*"), limit=limit, num_nodes=count)
    return list(found.values())


def ask(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = _TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs and return its answer.

    Raises:
        EnvironmentProblem: it is not installed, or does not answer.
    """
    program = shutil.which(command[0])
    if program is None:
        fix = "submit where Slurm's programs are (a login node); on Debian they are in the package slurm-client"
        raise EnvironmentProblem(f"{command[0]} is not on this machine: {fix}")
    try:
        return subprocess.run(
            [program, *command[1:]],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(f"Slurm does not answer: {command[0]} was silent for {timeout_s:g} s") from error


def words_of(stderr: str) -> str:
    """Return what a program of Slurm complained about, in one line."""
    lines = [line.partition("error: ")[2] or line for line in stderr.splitlines()]
    return "; ".join(line.strip().rstrip(".") for line in lines if line.strip()) or "nothing"
