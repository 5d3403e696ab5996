"""Options of ``backend=slurm``: a batch job whose session runs on the first of its nodes."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from launcher.config.backend.base import (
    DEFAULT_GLOBS,
    LEAST_MEMORY_BYTES,
    PROCESS_BYTES,
    Backend,
    forwarded_names,
    needed_ram,
    needed_ram_text,
    plausible_memory,
    requested_ram,
)
from launcher.config.backend.containers import ContainerKind, validate_container
from launcher.config.option_text import quoted_word
from launcher.config.paths import PathText
from launcher.errors import ConfigError
from launcher.protocol.plan import Host, MemoryEstimate
from launcher.utils.text import bytes_text

_SHARED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "XDG_CACHE_HOME")
"""Right on the nodes too: a cluster shares its software and its homes."""
_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)")
_MEMORY = re.compile(r"(?P<number>\d+)(?P<unit>[KMGT]?)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_WORD = re.compile(r"--([a-z][a-z-]*)(?:=.*)?", re.DOTALL)
_FROM_PLAN = "plan"
"""Value of ``mem`` that requests what the estimate needs."""
_MARGIN_S = 10
"""Beyond the time to save: for what the launcher itself does until the job is queued again."""

_OWNED = {
    **dict.fromkeys(("nodes", "ntasks"), "backend.nodes"),
    **dict.fromkeys(("gpus-per-node", "gpus", "gres"), "backend.gpus_per_node"),
    **dict.fromkeys(("requeue", "no-requeue"), "backend.requeue"),
    **dict.fromkeys(("export", "export-file", "get-user-env"), "backend.forward"),
    **dict.fromkeys(("output", "error", "open-mode"), "run.dir"),
    **dict.fromkeys(("wait", "parsable"), "backend.wait"),
    **{name: f"backend.{name}" for name in ("partition", "account", "qos", "time", "mem", "constraint")},
    **{name: f"backend.{name}" for name in ("reservation", "exclude", "nodelist", "exclusive")},
    **dict.fromkeys(("mem-per-cpu", "mem-per-gpu"), "backend.mem"),
    **dict.fromkeys(("container-image", "container-mounts", "container-workdir"), "backend.container"),
    "cpus-per-task": "backend.cpus_per_task",
    "signal": "backend.signal_lead_s",
    "job-name": "run.name",
    "ntasks-per-node": "backend.ranks",
    "array": "a sweep (-m) and backend.max_parallel",
    "wrap": "job",
    "input": "job",
    "test-only": "dry_run",
}
"""Options of sbatch that follow from options of ours, which are to be set instead."""


@dataclass(frozen=True, kw_only=True)
class SlurmBackend(Backend):
    """Ranks are processes of a Slurm job; nothing stays behind on the login node."""

    kind: ClassVar[str] = "slurm"
    summary_fields: ClassVar[tuple[str, ...]] = ("nodes", "partition", "time")
    is_detached: ClassVar[bool] = True

    nodes: int = 1
    """Nodes of the job; each gets the same number of ranks."""

    partition: str | None = None
    """Where to queue; Slurm's default if it is not set. `sinfo` lists them."""

    account: str | None = None
    """Account that is charged."""

    qos: str | None = None
    """Quality of service."""

    time: str | None = None
    """Time limit, ``HH:MM:SS`` or ``D-HH:MM:SS``; the partition's own if it is not set."""

    gpus_per_node: int | None = None
    """GPUs to request on each node; also the number of ranks there, unless ``ranks`` is set."""

    cpus_per_task: int | None = None
    """Cores to request on each node, for all of its ranks together."""

    mem: str | None = None
    """Memory to request on each node (``64G``; megabytes without a unit); 0 requests all of it.
    ``plan`` requests what the plan's estimate needs, in whole GiB; ``null`` leaves it to Slurm's default."""

    exclusive: bool = False
    """Allocate whole nodes, on which no other job runs."""

    constraint: str | None = None
    """Features that the nodes must have."""

    reservation: str | None = None
    """A reservation to run in."""

    exclude: str | None = None
    """Nodes to avoid (``n[3,7-9]``)."""

    nodelist: str | None = None
    """Nodes that must be among those of the job."""

    requeue: bool = True
    """Queue the job again after preemption; it resumes from its checkpoint, as the same run."""

    signal_lead_s: int = 120
    """Seconds before the time limit at which ranks save and exit.
    Slurm may be up to a minute early."""

    wait: bool = False
    """Show the job's output until it ends; Ctrl-C cancels it.
    Otherwise the command returns once the job is queued."""

    array: bool = True
    """Queue the runs of a sweep as one job array (one for each set of sbatch options).
    Otherwise each run is a job, queued in turn."""

    max_parallel: int | None = None
    """Most runs of a sweep's job array that run at the same time."""

    setup: tuple[str, ...] = ()
    """Lines of bash that prepare the job's environment (``module load cuda/12.4``).
    They run first in the batch script, and on every node before its job steps; a line that fails ends the job."""

    container: ContainerKind = "none"
    """What runs agents and ranks in a container: Slurm's plugin pyxis, or apptainer.
    The session runs outside of it."""

    image: PathText | None = None
    """Image of the container, with this program in it: a file on the shared disk, or an address."""

    python: str | None = None
    """The interpreter in the container; ``null`` is ``python``."""

    container_mounts: tuple[str, ...] = ()
    """More folders that containers see (``/scratch``, ``/data:/mnt:ro``).
    The working directory, the run directory, paths of options and caches are mounted without it."""

    forward: tuple[str, ...] = ()
    """Further environment variables that the job gets, as globs (``MY_*``)."""

    heartbeat_timeout_s: float = 4.0
    """Silence after which a node counts as lost."""

    sbatch_options: tuple[str, ...] = ()
    """More options of sbatch, one word each (``--mail-type=FAIL``)."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject what sbatch would refuse or misread, and times that do not fit together."""
        yield from super().validate()
        yield from self.validate_minimum(1, "nodes", "gpus_per_node", "cpus_per_task", "signal_lead_s", "max_parallel")
        yield from self.validate_minimum(2, "heartbeat_timeout_s")  # signs of life are a second apart
        yield from self._validate_control_characters()
        yield from self._validate_times()
        yield from self._validate_memory()
        yield from validate_container(
            self.container, image=self.image, python=self.python, mounts=self.container_mounts
        )
        for line in self.setup:
            yield from self._validate_line(line)
        for word in self.sbatch_options:
            yield from self._validate_word(word)

    def hosts(self, *, max_ranks: int | None) -> tuple[Host, ...]:
        """Return one placeholder for each node; Slurm chooses the nodes later."""
        gpus = self.gpus_per_node or 0
        automatic = min(gpus or 1, max_ranks or gpus or 1)
        slots = automatic if self.ranks == "auto" else self.ranks
        return tuple(
            Host(
                name=f"node{number}",
                slots=slots,
                address=f"node{number}",
                is_probed=False,
                devices=("GPU",) * gpus,
                device_ids=tuple(map(str, range(gpus))),
                cores=self.cpus_per_task or 1,
                python=sys.executable if self.container == "none" else self.python or "python",
            )
            for number in range(self.nodes)
        )

    def forwards(self, environ: Mapping[str, str]) -> tuple[str, ...]:
        """Return the names of variables that sbatch exports."""
        return forwarded_names(environ, (*DEFAULT_GLOBS, *_SHARED, *self.forward))

    def time_s(self) -> int | None:
        """Return the time limit in seconds; ``None`` where the partition's own holds."""
        found = _TIME.fullmatch(self.time or "")
        if found is None:
            return None
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    def _validate_control_characters(self) -> Iterator[ConfigError]:
        for field in ("partition", "account", "qos", "constraint", "reservation", "exclude", "nodelist"):
            value = getattr(self, field)
            if value is not None and (not value or not value.isprintable()):
                why = "is empty" if not value else "holds a line break or another control character"
                yield self.error(field, why, "name one, or leave it out")

    def _mem_bytes(self) -> int:
        """Return the amount in ``mem``; 0 where it names none, or all of a node's."""
        found = _MEMORY.fullmatch(self.mem or "")
        return int(found["number"]) * _UNITS[found["unit"] or "M"] if found else 0

    def sized_hosts(self, hosts: Sequence[Host], memory: MemoryEstimate | None) -> Sequence[Host]:
        """Return ``hosts`` with the RAM that ``mem=plan`` asks for, in whole GiB."""
        if self.mem != _FROM_PLAN or memory is None:
            return hosts
        return tuple(replace(host, memory_bytes=_whole_gib(requested_ram(_known(host), memory))) for host in hosts)

    def memory_text(self, host: Host) -> str | None:
        """Return the memory to request on a node, which is ``host`` of the plan, as sbatch takes it."""
        return f"{host.memory_bytes // _UNITS['G']}G" if self.mem == _FROM_PLAN else self.mem

    def describe_memory(self, host: Host, memory: MemoryEstimate | None) -> str:
        """Return how the memory of a node follows from the estimate; empty if it does not."""
        if self.mem != _FROM_PLAN or memory is None:
            return ""
        more = "" if host.devices else ", and a quarter more for activations"
        return f"--mem: {needed_ram_text(_known(host), memory)}{more}"

    def validate_memory(self, hosts: Sequence[Host], memory: MemoryEstimate | None) -> Iterator[ConfigError]:
        """Yield an error if the memory is below the estimate, or needs one and there is none."""
        if memory is None:
            if self.mem == _FROM_PLAN:
                why = (
                    "there is no estimate: the job has none, or the model's sizes are known only once it is downloaded"
                )
                yield self.error("mem", why, "set backend.mem=64G, or another amount")
            return
        given = self._mem_bytes()
        for host in map(_known, hosts[:1]):  # all nodes have the same number of ranks
            least = needed_ram(host, memory) - host.slots * (PROCESS_BYTES - LEAST_MEMORY_BYTES)
            if 0 < given < least:
                why = f"is {bytes_text(given)}, and a node needs at least {bytes_text(least)}"
                text = needed_ram_text(host, memory)
                fix = f"set backend.mem=plan, which requests {_whole_gib(requested_ram(host, memory)) >> 30}G ({text})"
                yield self.error("mem", why, fix)

    def _validate_memory(self) -> Iterator[ConfigError]:
        if self.mem in (None, _FROM_PLAN):
            return
        found = _MEMORY.fullmatch(self.mem)
        if found is None:
            yield self.error("mem", "is not an amount of memory", "set backend.mem=64G (K, M, G or T), or plan")
            return
        size = self._mem_bytes()
        if 0 < size < LEAST_MEMORY_BYTES:  # 0 is all of a node's
            unit = "" if found["unit"] else " (a number without a unit counts megabytes)"
            why = f"is {bytes_text(size)}{unit}, too little for any run"
            yield self.error("mem", why, f"set backend.mem={plausible_memory(self.mem, 'G')}")

    def _validate_times(self) -> Iterator[ConfigError]:
        if self.time is not None and self.time_s() is None:
            fix = "set backend.time=01:30:00 (in a YAML file within quotes: '01:30:00')"
            yield self.error("time", "is not a time", fix)
        needed = self.preempt_grace_s + _MARGIN_S
        if self.signal_lead_s < needed:
            why = f"ranks have backend.preempt_grace_s={self.preempt_grace_s:g} to save, and need {_MARGIN_S} s to exit"
            yield self.error("signal_lead_s", why, f"set backend.signal_lead_s={needed:g} or more")
        limit = self.time_s()
        if limit is not None and limit <= self.signal_lead_s:
            why = f"the ranks are signalled {self.signal_lead_s} s before the limit (backend.signal_lead_s)"
            yield self.error("time", why, "set a longer backend.time")

    def _validate_line(self, line: str) -> Iterator[ConfigError]:
        """Reject a line of ``setup`` that would not stay one line of the script."""
        if not line.strip() or not all(letter.isprintable() or letter == "\t" for letter in line):
            why = "is empty, or holds a line break or another control character"
            yield ConfigError("backend.setup", repr(line), why=why, fix="give each command as an entry of its own")
        elif re.search(r"(?<!\\)(?:\\\\)*\\$", line):
            why = "ends in a backslash, which would join it with the next line"
            yield ConfigError("backend.setup", repr(line), why=why, fix="write the command as one entry")
        elif not _has_closed_quotes(line):
            why = "has a quote that is not closed"
            fix = "close it, or write the commands into a file and source it"
            yield ConfigError("backend.setup", repr(line), why=why, fix=fix)

    def _validate_word(self, word: str) -> Iterator[ConfigError]:
        found = _WORD.fullmatch(word)
        option = "backend.sbatch_options"
        if not word.startswith("-") and self.sbatch_options[0].startswith("-"):
            joined = re.split(r",(?=-)", ",".join(self.sbatch_options))
            why, fix = "does not begin with a dash", "if it belongs to the previous value, write"
            yield ConfigError(option, repr(word), why=why, fix=f"{fix} {quoted_word(option, joined)}")
            return
        if found is None or not word.isprintable():
            yield ConfigError(
                option, repr(word), why="is not one word of the form --name=value", fix="write it in this form"
            )
            return
        for name, ours in _OWNED.items():
            if name.startswith(found[1]):  # sbatch takes the beginning of a name for the name
                yield ConfigError(option, word, why=f"--{name} is set by {ours}", fix=f"set {ours} instead")
                return


def _known(host: Host) -> Host:
    """Return a placeholder as a host whose devices are those that the job asks for."""
    return replace(host, is_probed=True)


def _whole_gib(num_bytes: int) -> int:
    return -(-num_bytes // _UNITS["G"]) * _UNITS["G"]


def _has_closed_quotes(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class SlurmAllocation(SlurmBackend):
    """The same options once the job runs: its nodes exist and can be probed."""

    probes_hosts: ClassVar[bool] = True
    is_detached: ClassVar[bool] = False

    def sized_hosts(self, hosts: Sequence[Host], memory: MemoryEstimate | None) -> Sequence[Host]:
        """Return ``hosts`` with the RAM that was found there."""
        return hosts
