"""Run, the typed configuration of all groups, and the base classes Job and Benchmark.

Both of these validate against the whole run.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from launcher.config.activation import ActivationCheckpointing
from launcher.config.adapter import Adapter, Lora
from launcher.config.attention import Attention
from launcher.config.backend.base import Backend
from launcher.config.batch import solve_batch
from launcher.config.checkpoint import Checkpoint
from launcher.config.compile import Compile
from launcher.config.component import Component
from launcher.config.data.auto import AutoData
from launcher.config.data.base import Data
from launcher.config.data.shapes import SHAPES, Shape
from launcher.config.model.base import Model
from launcher.config.optimizer import Optimizer
from launcher.config.parallel.base import Parallel
from launcher.config.paths import PathText, named_paths
from launcher.config.precision import Precision
from launcher.config.profile import Profile, ProfileUnit
from launcher.config.quantization import NoQuantization, Quantization
from launcher.config.registry import KINDS
from launcher.config.schedule import Schedule
from launcher.config.sparsity import Sparsity
from launcher.config.tracker import Tracker
from launcher.errors import ConfigError
from launcher.protocol.plan import Batch, Host, Plan
from launcher.protocol.rundir import RunDir
from launcher.utils.schema import to_tree

LEARNING_GROUPS = frozenset({"optimizer", "schedule", "activation", "adapter"})
"""Groups that only optimizer steps use."""

COMPUTING_GROUPS = LEARNING_GROUPS | {"precision", "attention", "compile"}
"""Groups that say how a model computes and learns."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run is kept."""

    root: PathText = "runs"
    """Folder of all runs."""

    name: str = "run"
    """Folder below ``root``, and W&B group; default: the model's name.
    Of a path or a hub name only the last part is taken; a name is never a path."""

    dir: PathText | None = None
    """The run directory itself, instead of ``<root>/<name>/<time>-<letters>``."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run, typed and resolved."""

    job: Job
    model: Model
    data: Data
    parallel: Parallel
    optimizer: Optimizer
    schedule: Schedule
    precision: Precision
    quantization: Quantization | NoQuantization
    sparsity: Sparsity
    adapter: Adapter
    activation: ActivationCheckpointing
    attention: Attention
    compile: Compile
    checkpoint: Checkpoint
    benchmark: Benchmark | NoBenchmark
    profile: Profile
    tracker: Tracker
    backend: Backend
    deploy: Deploy
    run: RunOptions
    plugins: tuple[str, ...] = ()
    """Modules of the plugins that this run uses; ranks import them before they read its options."""

    @property
    def lora(self) -> Lora | None:
        """The adapter that is trained, or continued; ``None`` where all weights are."""
        return self.adapter if isinstance(self.adapter, Lora) else None

    @property
    def batched_job(self) -> BatchedJob:
        """The job as engines know it: one that works through batches."""
        assert isinstance(self.job, BatchedJob), f"job={self.job.kind} has no batches, and asks for no engine"
        return self.job

    def components(self) -> Iterator[Component]:
        """Yield the component of each group."""
        for group in KINDS:
            yield getattr(self, group)

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield option and value of every path that this run names."""
        for group in (*KINDS, "run"):
            yield from named_paths(group, getattr(self, group))


@dataclass(frozen=True, kw_only=True)
class Job(Component):
    """One piece of work that every rank of a run does together."""

    group: ClassVar[str] = "job"

    saves: ClassVar[bool] = False
    """Whether it writes checkpoints."""

    resumes: ClassVar[bool] = False
    """Whether it loads the checkpoint that ``checkpoint.resume`` names."""

    reads_other_ranks_files: ClassVar[bool] = False
    """Whether ranks read what others wrote into the run directory: all hosts must share it."""

    handles_preemption: ClassVar[bool] = False
    """Whether ranks handle SIGTERM and SIGUSR1: save, and exit with the resume code."""

    completes_on_signal: ClassVar[bool] = False
    """Whether it runs until a signal (SIGTERM, Ctrl-C) ends it, and then counts as completed."""

    seed: int = 0
    """Seed of weights, sample order and sampling.
    The same seed gives the same samples on any number of ranks."""

    @property
    def uses_bf16_kernels(self) -> bool:
        """Whether the launcher's bf16 kernels are used: for processors without bf16 instructions."""
        return False

    @property
    def optimizer_steps(self) -> int | None:
        """Return the optimizer steps that the learning rate schedule covers; ``None`` without any."""
        return None

    @property
    def profile_unit(self) -> ProfileUnit:
        """Unit in which ``profile=true`` counts its window."""
        return "time"

    @abstractmethod
    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return the number of steps of the work: global batches, or the unit that this job counts."""

    @property
    def shutdown_grace_s(self) -> float:
        """Least time that ranks get to exit after the signal that ends them."""
        return 0.0

    def max_ranks(self, run: Run) -> int | None:
        """Return the most ranks that it can use; ``backend.ranks=auto`` takes no more."""
        return run.parallel.max_ranks

    def batch(self, run: Run, *, world_size: int) -> Batch | None:
        """Return the batch of a step; ``None`` without one."""
        return None

    def unused_groups(self, run: Run) -> frozenset[str]:
        """Return the groups that have no effect on this job; setting one is rejected."""
        return frozenset({"benchmark"})

    def unused_options(self, run: Run) -> Mapping[str, str]:
        """Return the options of the group ``job`` that have no effect, each with the reason."""
        return {}

    def unused_model_options(self, run: Run) -> Mapping[str, str]:
        """Return the ``model`` options that have no effect on this job, each with the reason."""
        return {}

    def unused_strategy(self, run: Run) -> str:
        """Return why the strategy of the run spreads nothing; empty where it does."""
        return ""

    def names_itself(self, run: Run) -> str:
        """Return the overrides that select this job."""
        return f"job={self.kind}"

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Yield the errors of this job in this run."""
        yield from ()

    def validate_machine(self, run: Run, run_dir: RunDir) -> Iterator[ConfigError]:
        """Yield the errors that only this machine shows: files, packages, ports."""
        yield from ()

    def warnings(self, run: Run, *, world_size: int) -> Iterator[str]:
        """Yield warnings for the plan."""
        yield from ()

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield the lines that the plan shows besides the batch: name and value."""
        yield from ()

    def files(self) -> Iterator[str]:
        """Yield the files it writes in the run directory besides those of every run."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class BatchedJob(Job):
    """A job that processes global batches on an engine; by default it trains."""

    trains: ClassVar[bool] = True
    """Whether it takes optimizer steps.
    Otherwise there are no learning rate, gradients and moments."""

    micro_batch: int = 8
    """Sequences in one forward pass of one rank."""

    global_batch: int | None = None
    """Sequences a step over all ranks: micro_batch x gradient_accumulation_steps x data ranks."""

    gradient_accumulation_steps: int | None = None
    """Forward passes a step and rank; set this or ``global_batch``.
    With neither it is 1, or what fills a pipeline."""

    sequence_length: int = 128
    """Tokens in one sequence."""

    @property
    def clip_norm(self) -> float:
        """Largest global L2 norm of the gradient; 0 disables clipping."""
        return 0.0

    def num_sequences(self, run: Run, *, world_size: int) -> int | None:
        """Return the sequences of all steps together; ``None`` where its steps are no batches."""
        return self.num_steps(run, world_size=world_size) * self.batch(run, world_size=world_size).global_batch

    def unused_groups(self, run: Run) -> frozenset[str]:
        """Add what only optimizer steps use, where none are taken."""
        return super().unused_groups(run) | (frozenset() if self.trains else LEARNING_GROUPS)

    def validate(self) -> Iterator[ConfigError]:
        """Yield counts that make no batch."""
        yield from self.validate_minimum(1, "micro_batch", "global_batch", "gradient_accumulation_steps")
        yield from self.validate_minimum(2, "sequence_length")
        yield from self.validate_minimum(0, "seed")

    def validate_shapes(self, run: Run, data: AutoData, shapes: Collection[Shape]) -> Iterator[ConfigError]:
        """Yield why the job cannot use rows of these shapes.

        Args:
            run: of the job.
            data: whose rows they are.
            shapes: of them; none where the data is not on this machine yet.
        """
        if "preference" in shapes:
            why = f"holds {SHAPES['preference']}, and job={self.kind} takes single answers"
            fix = "give rows of messages or of prompt and response, as of the preferred answers"
            yield ConfigError("data.path", _shown_path(data), why=why, fix=fix)

    def batch(self, run: Run, *, world_size: int) -> Batch:
        """Return how ``world_size`` ranks go through one global batch.

        Raises:
            ConfigError: it does not come out even.
        """
        return solve_batch(
            micro_batch=self.micro_batch,
            global_batch=self.global_batch,
            gradient_accumulation_steps=run.parallel.gradient_accumulation_steps or self.gradient_accumulation_steps,
            data_parallel=run.parallel.data_parallel(world_size),
            default=run.parallel.default_gradient_accumulation_steps,
        )


def _shown_path(data: AutoData) -> str:
    entries = data.entries("path")
    return entries[0] if len(entries) == 1 else f"[{','.join(entries)}]"


@dataclass(frozen=True, kw_only=True)
class LearningJob(BatchedJob):
    """A job that takes optimizer steps."""

    steps: int
    """Optimizer steps."""

    clip_norm: float = 1.0
    """Largest global L2 norm of the gradient; 0 disables clipping."""

    @property
    def optimizer_steps(self) -> int:
        """All of them."""
        return self.steps

    def validate(self) -> Iterator[ConfigError]:
        """Reject counts that make no step."""
        yield from super().validate()
        yield from self.validate_minimum(1, "steps")
        yield from self.validate_minimum(0, "clip_norm")


@dataclass(frozen=True, kw_only=True)
class Benchmark(Component):
    """A claim that is measured: cases that do the same work in different ways."""

    group: ClassVar[str] = "benchmark"

    max_ranks: ClassVar[int | None] = 1
    """The most ranks it can use."""

    isolation: ClassVar[str] = "each in a process of its own"
    """How its cases are isolated from each other; shown below its table."""

    supports_quantized: ClassVar[bool] = False
    """Whether the model may be quantized, because it generates text and is not trained."""

    needs_model: ClassVar[bool] = False
    """Whether it uses the run's model."""

    needs_data: ClassVar[bool] = False
    """Whether it uses the run's data."""

    uses_parallel: ClassVar[bool] = False
    """Whether it measures the run's strategy."""

    used_groups: ClassVar[frozenset[str]] = frozenset()
    """Which of the groups that say how a model computes and learns have an effect on it."""

    repeats: int = 3
    """Rounds in which every case is measured, in turn (A B A B), each time in a new process."""

    warmup: int = 1
    """Whole steps of a case before the one that is measured, in the same process."""

    @property
    def num_measurements(self) -> int:
        """How many processes are started; progress counts to it."""
        return self.repeats

    def validate(self) -> Iterator[ConfigError]:
        """Reject counts that measure nothing."""
        yield from self.validate_minimum(1, "repeats")
        yield from self.validate_minimum(0, "warmup")

    @property
    def server_options(self) -> Mapping[str, Any] | None:
        """Options of the job=serve that it starts for itself; ``None`` where it starts none."""
        return None

    @property
    def train_options(self) -> Mapping[str, Any] | None:
        """Options of the job=train whose steps the cases run; ``None`` if they run no steps."""
        return None

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Yield the errors of this benchmark in this run."""
        yield from ()

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield the errors that only this machine shows."""
        yield from ()

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the lines that the plan shows: name and value."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class NoBenchmark(Component):
    """Nothing to measure: what jobs other than ``benchmark`` have here."""

    group: ClassVar[str] = "benchmark"
    kind: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class Deploy(Component):
    """What ``launch deploy`` renders for a server; it has no effect on a run."""

    group: ClassVar[str] = "deploy"

    def hosts(self, run: Run) -> tuple[Host, ...]:
        """Return the host that the server will run on, for its plan.

        Raises:
            ConfigError: nothing is deployed.
        """
        kinds = [kind for kind in KINDS[self.group] if kind != self.kind]
        raise ConfigError(
            self.group, self.kind, why="there is nothing to render", fix=f"set deploy={' or '.join(kinds)}"
        )

    def validate_run(self, run: Run, plan: Plan) -> Iterator[ConfigError]:
        """Yield why this run cannot be deployed so.

        Args:
            run: the server, with this group.
            plan: of the server on ``hosts``.
        """
        yield from ()


@dataclass(frozen=True, kw_only=True)
class NoDeploy(Deploy):
    """Nothing to deploy: what every run has here."""

    kind: ClassVar[str] = "none"


def run_to_tree(run: Run) -> dict[str, Any]:
    """Return the plain tree that ``build_run`` turns back into an equal run."""
    tree: dict[str, Any] = to_tree(run)
    if not run.plugins:
        del tree["plugins"]
    return tree


def default_run_name(model_name: str) -> str:
    """Return a model's run name: the last part of a local folder's path or of a hub name."""
    if "/" not in model_name and model_name not in (".", ".."):
        return model_name
    return Path(os.path.abspath(os.path.expanduser(model_name))).name or "model"  # noqa: PTH100, PTH111 (links stay)
