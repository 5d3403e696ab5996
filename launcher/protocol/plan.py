"""The plan: all a backend needs to start a run, as frozen values that print and compare."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import ConfigError, ConfigErrors
from launcher.utils.schema import build


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine that takes part: an input of the planner."""

    name: str
    """Name in plans and logs."""
    slots: int
    """Ranks it takes."""
    address: str = "127.0.0.1"
    """Where the other hosts reach it."""
    ssh_destination: str = ""
    """ssh destination of the host, ``user@name:port`` as in the hostfile; empty for this one."""
    is_probed: bool = True
    """Whether the fields below were probed; a dry run assumes them."""
    devices: tuple[str, ...] = ()
    """GPU names by index; empty where ranks compute on the CPU."""
    device_ids: tuple[str, ...] = ()
    """Names of ``devices`` in CUDA_VISIBLE_DEVICES."""
    slot_ids: tuple[int, ...] = ()
    """Which of ``devices`` the ranks get, where the user chose; empty means the first ones."""
    interface: str = ""
    """Network interface that leads to the other hosts; empty where there are none."""
    device_bytes: int = 0
    """Memory of the smallest GPU; 0 when not known."""
    cores: int = 1
    memory_bytes: int = 0
    """Host RAM; 0 when not known."""
    computes_bf16: bool = True
    """Whether its processor has bfloat16 instructions; otherwise products convert in software."""
    python: str = "python"
    """The interpreter that runs this program there."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Identity of a run: an input of the planner."""

    run_id: str
    run_dir: str
    """Absolute path."""
    run_hash: str
    """SHA-256 of run.yaml."""
    port: int
    """Port of the rendezvous on the first host."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One process to start: argv is passed as it is, never through a shell."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    """Added to what the process inherits. Never holds a secret."""


@dataclass(frozen=True, kw_only=True)
class RankPlacement:
    """Where one rank runs."""

    rank: int
    host: str
    local_rank: int
    device: str


@dataclass(frozen=True, kw_only=True)
class HostPlan:
    """Processes of one host."""

    host: Host
    first_rank: int
    build_commands: tuple[Command, ...] = ()
    """Run one after the other, before any rank starts (building native ops)."""
    agent_command: Command
    """The agent (torchrun or deepspeed) that starts this host's ranks."""
    sidecars: tuple[Command, ...] = ()
    """Further processes (a tracker); their failure never ends the run."""


@dataclass(frozen=True, kw_only=True)
class TrackerPlan:
    """Where metrics go besides the run directory."""

    kind: str
    mode: str
    reason: str
    run_id: str
    project: str | None = None
    group: str | None = None
    place: str = ""
    """Address, database or folder that it writes to, without a password; may be empty."""
    members: tuple[TrackerPlan, ...] = ()
    """The trackers that it consists of, where it is several."""

    @property
    def processes(self) -> tuple[TrackerPlan, ...]:
        """The trackers that run, each in a process of its own."""
        each = self.members or (self,)
        return tuple(one for one in each if one.kind != "local" and one.mode != "disabled")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A solved batch equation; ``micro_batch`` and ``global_batch`` count sequences."""

    micro_batch: int
    gradient_accumulation_steps: int
    data_parallel: int

    @property
    def global_batch(self) -> int:
        """Sequences in one optimizer step over all ranks."""
        return self.micro_batch * self.gradient_accumulation_steps * self.data_parallel

    def __str__(self) -> str:
        steps = self.gradient_accumulation_steps
        return f"micro {self.micro_batch} × accum {steps} × dp {self.data_parallel} = {self.global_batch}"


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much the run will do."""

    batch: Batch | None
    """``None`` for a job whose steps are no batches: a benchmark, a quantization."""
    num_steps: int
    """Optimizer steps, or what else the job counts its progress in."""
    tokens_per_step: int
    total_tokens: int
    """Of all steps; the last ones of an evaluation may not be full."""


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Model state of one rank in bytes, by where it lives; activations and buffers come on top."""

    parameters: int
    gradients: int
    optimizer: int
    """Master weights, where the compute format is not fp32, and the optimizer's moments."""
    host: int = 0
    """The part of the above that is offloaded to host RAM."""
    nvme: int = 0
    """The part of the above that is offloaded to NVMe."""

    @classmethod
    def fp32(cls, num_params: int, *, moments: float = 2, offloaded: bool = False) -> StateBytes:
        """Return the bytes of so many parameters with gradients and ``moments``, all in fp32."""
        size, optimizer = 4 * num_params, round(4 * num_params * moments)
        host = 2 * size + optimizer if offloaded else 0
        return cls(parameters=size, gradients=size, optimizer=optimizer, host=host)

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def device(self) -> int:
        """The part that stays on the compute device."""
        return self.total - self.host - self.nvme


@dataclass(frozen=True, kw_only=True)
class NativeOps:
    """DeepSpeed operators a run compiles before its ranks start."""

    needed: tuple[str, ...] = ()
    """Without these the run cannot be what was asked for."""
    optional: tuple[str, ...] = ()
    """Without these the run takes another way and says so."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Model state by formula; activations, buffers and the framework come on top."""

    num_params: int
    per_rank: StateBytes
    per_host_ram: int
    per_host_nvme: int
    formula: str
    """The arithmetic and its source."""
    checkpoint_copies: int = 0
    """Bytes of host RAM a rank for copies of its share of a checkpoint.
    They are written beside the steps."""


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """The components of the run as text; empty for those that the job does not use."""

    model: str = ""
    data: str = ""
    strategy: str = ""
    engine: str = ""
    precision: str = ""
    optimizer: str = ""
    """Empty, like ``schedule``, where nothing is learnt."""
    schedule: str = ""
    activation: str = ""
    attention: str = ""
    compile: str = ""
    checkpoint: str = ""
    benchmark: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, ready to start."""

    run_id: str
    name: str
    run_dir: str
    run_dir_on_hosts: str = ""
    """Where hosts keep the run, if that is another folder than on the machine that plans."""
    run_hash: str
    """SHA-256 of run.yaml, checked by every rank."""
    job: str
    backend: str
    """Kind of the backend that starts it."""
    world_size: int
    topology: dict[str, int]
    """Degree of each kind of parallelism; their product is the world size."""
    summary: PlanSummary
    port: int
    ranks: tuple[RankPlacement, ...]
    hosts: tuple[HostPlan, ...]
    work: Work
    memory: MemoryEstimate | None
    """``None`` if the model's sizes are unknown before its download, or there is no model."""
    engine_config: dict[str, Any] | None
    """DeepSpeed's configuration, if every native operator exists; ``None`` on other engines."""
    tracker: TrackerPlan
    details: dict[str, str] = field(default_factory=dict)
    """Parts of the work besides its batches, with a description each; most jobs have none."""
    files: tuple[str, ...]
    """Files that the run will write, relative to the run directory."""
    handles_preemption: bool = False
    """Whether ranks save after SIGTERM and SIGUSR1, so that the run can be resumed."""
    completes_on_signal: bool = False
    """Whether ranks that end well after SIGTERM or Ctrl-C have completed the run."""
    stall_timeout_s: float
    grace_s: float
    """Time that ranks get to save and end after SIGTERM."""
    preempt_grace_s: float
    """The same after SIGUSR1."""
    interrupt_grace_s: float | None = None
    """The same after Ctrl-C, where no rank saves; ``None`` for ``grace_s``."""
    heartbeat_timeout_s: float = 0.0
    """Seconds of silence after which a host or the session counts as lost; 0 if not watched.
    It is 0 where no loss can go unnoticed."""
    forwarded_env: tuple[str, ...] = ()
    """Names of variables that hosts get from the launching environment; no plan holds values."""
    show_ranks: tuple[int, ...] | None
    """Ranks whose output is shown; ``None`` shows all."""
    warnings: tuple[str, ...] = ()

    def grace_after(self, number: int) -> float:
        """Return the seconds between a signal to the ranks and SIGKILL."""
        if number == signal.SIGUSR1:
            return self.preempt_grace_s
        if number == signal.SIGINT and self.interrupt_grace_s is not None:
            return self.interrupt_grace_s
        return self.grace_s


def plan_from_json(tree: dict[str, Any]) -> Plan:
    """Return the plan that ``plan.json`` holds.

    Raises:
        ConfigErrors: the file was not written by this version.
    """
    mistakes: list[ConfigError] = []
    plan = build(Plan, tree, path="plan", report=mistakes.append)
    if plan is None:
        raise ConfigErrors(mistakes)
    return plan


def host_ram(host: Host, state: StateBytes) -> int:
    """Return the bytes of model state in one host's RAM: offloaded, or all without GPUs."""
    return host.slots * (state.host + (0 if host.devices or not host.is_probed else state.device))


def first_ranks(hosts: Sequence[Host]) -> list[int]:
    """Return the number of the first rank on each host: ranks are counted host by host."""
    firsts, seen = [], 0
    for host in hosts:
        firsts.append(seen)
        seen += host.slots
    return firsts
