"""Job verify: compare parallel strategies with one process; the list of these strategies."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar, Final, Literal

from launcher.config.activation import (
    ActivationCheckpointing,
    FullCheckpointing,
    OffloadCheckpointing,
    SelectiveCheckpointing,
)
from launcher.config.batch import solve_batch
from launcher.config.model.config_json import dropout_rates
from launcher.config.option_text import component_text
from launcher.config.parallel.base import Parallel
from launcher.config.parallel.data_parallel import Ddp, Fsdp, Single
from launcher.config.parallel.deepspeed_pipeline import DeepSpeedPipeline
from launcher.config.parallel.pipeline import Pipeline
from launcher.config.parallel.zero import Zero
from launcher.config.precision import Fp32Precision
from launcher.config.run import LearningJob, Run
from launcher.config.supported_models import validate_family
from launcher.errors import ConfigError
from launcher.protocol.plan import Batch
from launcher.utils.text import counted, did_you_mean


@dataclass(frozen=True)
class Strategy:
    """Options that differ from the user's run.

    Model, data, optimizer, steps and global batch never differ.
    """

    parallel: Parallel
    _: KW_ONLY
    activation: ActivationCheckpointing | None = None
    """Policy for activations; the run's own by default."""
    micro_batch: int | None = None
    """Sequences in one forward pass; default: the run's, or the most that divide a rank's share."""
    ranks: int = 1
    """Least ranks for this strategy."""

    def batch(self, run: Run, *, world_size: int, sequences: int) -> Batch:
        """Return how ``world_size`` ranks go through a global batch of ``sequences``.

        Raises:
            ConfigError: they cannot share it out.
        """
        beside = self.parallel.data_parallel(world_size)
        wanted, share = self.micro_batch or run.batched_job.micro_batch, max(1, sequences // beside)
        return solve_batch(
            micro_batch=max(size for size in range(1, min(wanted, share) + 1) if share % size == 0),
            global_batch=sequences,
            gradient_accumulation_steps=self.parallel.gradient_accumulation_steps,
            data_parallel=beside,
        )

    def apply(self, run: Run, *, world_size: int, sequences: int) -> Run:
        """Return the run that this case makes of ``run`` on that many ranks with that global batch."""
        batch = self.batch(run, world_size=world_size, sequences=sequences)
        job = replace(
            run.batched_job,
            micro_batch=batch.micro_batch,
            global_batch=batch.global_batch,
            gradient_accumulation_steps=None,
        )
        return replace(run, parallel=self.parallel, activation=self.activation or run.activation, job=job)

    def validate(self, run: Run, *, world_size: int, sequences: int) -> Iterator[str]:
        """Yield why this strategy cannot run with ``world_size`` ranks and ``sequences`` a step."""
        dims = self.parallel.dims(world_size)
        if world_size < self.ranks:
            yield f"needs {counted(self.ranks, 'rank')}"
        if dims.product != world_size:
            yield f"{dims} does not fill {counted(world_size, 'rank')}"
        length = run.batched_job.sequence_length
        if length % dims.sequence:
            yield f"job.sequence_length={length} does not divide over {dims.sequence} ranks"
        shape = run.model.shape()
        for error in self.parallel.validate_run(world_size, run.precision, optimizer=run.optimizer, shape=shape):
            yield error.why
        for error in validate_family(self.parallel, run.model, run.attention, world_size=world_size, length=length):
            yield error.why
        try:
            batch = self.batch(run, world_size=world_size, sequences=sequences)
        except ConfigError as uneven:
            yield uneven.why
            return
        for error in self.parallel.validate_batch(batch):
            yield error.why

    def describe(self, run: Run, *, world_size: int, sequences: int) -> str:
        """Return strategy, degrees and batch as text."""
        words = [component_text(self.parallel)]
        if not isinstance(self.parallel, Single):
            words.append(str(self.parallel.dims(world_size)))
        if self.activation is not None:
            words.append(f"activation {component_text(self.activation)}")
        return ", ".join([*words, str(self.batch(run, world_size=world_size, sequences=sequences))])


SINGLE_PROCESS = Strategy(Single())
"""One process, which all others are compared with."""
_ZERO3: Final = Zero(stage=3, persistence_threshold=0)  # models are small here: partition all of it
_FULL_CHECKPOINTING: Final = FullCheckpointing()
_CHECKPOINT_EVERY_2: Final = SelectiveCheckpointing(k=2)

STRATEGIES: Final[dict[str, Strategy]] = {
    # the whole model on every rank
    "ddp": Strategy(Ddp()),
    "ddp_micro1": Strategy(Ddp(), micro_batch=1),
    "ddp_recomputed": Strategy(Ddp(), activation=_FULL_CHECKPOINTING),
    "ddp_every_2": Strategy(Ddp(), activation=_CHECKPOINT_EVERY_2),
    "ddp_activations_offloaded": Strategy(Ddp(), activation=OffloadCheckpointing()),
    # shards of FSDP2
    "fsdp": Strategy(Fsdp()),
    "fsdp_micro1": Strategy(Fsdp(), micro_batch=1),
    "fsdp_recomputed": Strategy(Fsdp(), activation=_FULL_CHECKPOINTING),
    "fsdp_every_2": Strategy(Fsdp(), activation=_CHECKPOINT_EVERY_2),
    "fsdp_kept": Strategy(Fsdp(reshard_after_forward=False)),
    "fsdp_offload": Strategy(Fsdp(offload="cpu")),
    "hsdp": Strategy(Fsdp(replicate=2), ranks=4),
    # shards of DeepSpeed
    "zero0": Strategy(Zero(stage=0)),
    "zero1": Strategy(Zero(stage=1)),
    "zero2": Strategy(Zero(stage=2)),
    "zero3": Strategy(_ZERO3),
    "zero3_micro1": Strategy(_ZERO3, micro_batch=1),
    "zero3_recomputed": Strategy(_ZERO3, activation=_FULL_CHECKPOINTING),
    "zero3_every_2": Strategy(_ZERO3, activation=_CHECKPOINT_EVERY_2),
    "zero2_offload": Strategy(Zero(stage=2, offload_optimizer="cpu", pin_memory=False)),
    "zero3_offload": Strategy(
        Zero(stage=3, persistence_threshold=0, offload_optimizer="cpu", offload_parameters="cpu", pin_memory=False)
    ),
    # slices of matrices and of sequences
    "tensor": Strategy(Fsdp(tensor=2), ranks=2),
    "tensor_recomputed": Strategy(Fsdp(tensor=2), activation=_FULL_CHECKPOINTING, ranks=2),
    "sequence": Strategy(Fsdp(sequence_parallel=2), ranks=2),
    "sequence_recomputed": Strategy(Fsdp(sequence_parallel=2), activation=_FULL_CHECKPOINTING, ranks=2),
    # stages on ranks of their own; where there are more, pipelines side by side
    "pipeline2_gpipe": Strategy(Pipeline(stages=2, schedule="gpipe"), ranks=2),
    "pipeline2_1f1b": Strategy(Pipeline(stages=2, schedule="1f1b"), ranks=2),
    "pipeline2_1f1b_micro1": Strategy(Pipeline(stages=2, schedule="1f1b"), micro_batch=1, ranks=2),
    "pipeline2_1f1b_recomputed": Strategy(Pipeline(stages=2, schedule="1f1b"), activation=_FULL_CHECKPOINTING, ranks=2),
    "pipeline2_1f1b_every_2": Strategy(Pipeline(stages=2, schedule="1f1b"), activation=_CHECKPOINT_EVERY_2, ranks=2),
    "pipeline2_interleaved": Strategy(Pipeline(stages=2, schedule="interleaved_1f1b"), ranks=2),
    "pipeline2_zero_bubble": Strategy(Pipeline(stages=2, schedule="interleaved_zero_bubble"), ranks=2),
    "pipeline2_zbv": Strategy(Pipeline(stages=2, schedule="zbv"), ranks=2),
    "pipeline2_fsdp": Strategy(Pipeline(stages=2, schedule="1f1b", data="shard"), ranks=4),
    "pipeline4_gpipe": Strategy(Pipeline(stages=4, schedule="gpipe"), ranks=4),
    "pipeline4_1f1b": Strategy(Pipeline(stages=4, schedule="1f1b"), ranks=4),
    "pipeline4_interleaved": Strategy(Pipeline(stages=4, schedule="interleaved_1f1b"), ranks=4),
    "pipeline4_zero_bubble": Strategy(Pipeline(stages=4, schedule="interleaved_zero_bubble"), ranks=4),
    "pipeline4_zbv": Strategy(Pipeline(stages=4, schedule="zbv"), ranks=4),
    "deepspeed_pipeline2": Strategy(DeepSpeedPipeline(stages=2), ranks=2),
    "deepspeed_pipeline4": Strategy(DeepSpeedPipeline(stages=4), ranks=4),
}
"""Name to strategy, in the order in which they are taken."""

OWN_STRATEGY = "run"
"""Name of the strategy that the run itself has: ``parallel`` and ``activation``."""


@dataclass(frozen=True, kw_only=True)
class SelectedStrategies:
    """Strategies to verify."""

    sequences: int
    """The global batch of all."""
    cases: dict[str, Strategy] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Name to the reason why it cannot be taken."""


def select_strategies(job: Verify, run: Run, *, world_size: int) -> SelectedStrategies:
    """Return the strategies of ``job.strategies``: those that fit, and those that do not.

    Raises:
        ConfigError: the batch of the run does not come out even.
    """
    sequences = job.batch(run, world_size=world_size).global_batch
    choice = SelectedStrategies(sequences=sequences)
    for name, case in _candidates(job, run).items():
        why = next(case.validate(run, world_size=world_size, sequences=sequences), None)
        if why is None:
            choice.cases[name] = case
        else:
            choice.left_out[name] = why
    return choice


def _candidates(job: Verify, run: Run) -> dict[str, Strategy]:
    """Return the named strategies, or all; with the run's own if it is another."""
    own = Strategy(run.parallel, activation=run.activation)
    if job.strategies == "auto":
        known = isinstance(run.parallel, Single) or any(
            case.parallel == own.parallel and case.activation in (None, own.activation) for case in STRATEGIES.values()
        )
        return STRATEGIES if known else {OWN_STRATEGY: own, **STRATEGIES}
    everything = {OWN_STRATEGY: own, **STRATEGIES}
    return {name: everything[name] for name in job.strategies}


@dataclass(frozen=True, order=True)
class Placement:
    """A strategy on a number of ranks."""

    name: str
    """Of the strategy."""
    ranks: int

    def __str__(self) -> str:
        return f"{self.name}@{self.ranks}"


@dataclass(frozen=True, kw_only=True)
class ResumePairs:
    """Which checkpoints are resumed under which strategies."""

    sequences: int
    """The global batch of all."""
    cases: dict[str, Strategy] = field(default_factory=dict)
    pairs: tuple[tuple[Placement, Placement], ...] = ()
    """Where a checkpoint is saved, and where it is resumed."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Name to the reason why it cannot be taken."""

    @property
    def sources(self) -> list[Placement]:
        """Where checkpoints are saved."""
        return sorted({source for source, _ in self.pairs})

    @property
    def targets(self) -> dict[Placement, list[Placement]]:
        """Where they are resumed, and which ones there."""
        found: dict[Placement, list[Placement]] = defaultdict(list)
        for source, target in sorted(self.pairs):
            found[target].append(source)
        return dict(sorted(found.items()))


def select_pairs(job: Verify, run: Run, *, world_size: int) -> ResumePairs:
    """Return every ordered pair of strategies, one process included, on drawn ranks.

    ``job.seed`` draws the numbers of ranks. Each strategy on each number that it
    fits is source and target at least once.

    Raises:
        ConfigError: the batch of the run does not come out even.
    """
    sequences = job.batch(run, world_size=world_size).global_batch
    cases, left_out = dict[str, Strategy](), dict[str, str]()
    sizes: dict[str, list[int]] = {}
    known: list[Parallel] = []
    for name, case in {"single": SINGLE_PROCESS, **_candidates(job, run)}.items():
        if case.parallel in known:
            continue  # with other micro-batches or activations: the same checkpoint
        known.append(case.parallel)
        why = {
            ranks: next(case.validate(run, world_size=ranks, sequences=sequences), "")
            for ranks in range(1, world_size + 1)
        }
        if fitting := [ranks for ranks, reason in why.items() if not reason]:
            cases[name], sizes[name] = case, fitting
        else:
            left_out[name] = why[world_size]
    pairs = tuple(_draw_pairs(sizes, random.Random(job.seed)))
    return ResumePairs(sequences=sequences, cases=cases, pairs=pairs, left_out=left_out)


def _draw_pairs(sizes: Mapping[str, Sequence[int]], chance: random.Random) -> Iterator[tuple[Placement, Placement]]:
    """Yield every ordered pair of names, and some again until all sizes were on both sides."""
    sources, targets = (
        {name: itertools.cycle(chance.sample(list(of), len(of))) for name, of in sizes.items()} for _ in range(2)
    )
    pairs = list(itertools.product(sizes, sizes))
    most = max(map(len, sizes.values()), default=0)
    rounds = -(-most // max(1, len(sizes)))
    for source, target in pairs * rounds:
        yield Placement(source, next(sources[source])), Placement(target, next(targets[target]))


@dataclass(frozen=True, kw_only=True)
class Verify(LearningJob):
    """The same few optimizer steps under many strategies, each compared with one process."""

    kind: ClassVar[str] = "verify"
    reads_other_ranks_files: ClassVar[bool] = True

    steps: int = 10
    """Optimizer steps that every strategy takes."""

    check: Literal["steps", "resume"] = "steps"
    """``steps`` compares each strategy with one process.
    ``resume`` saves a checkpoint under each, on numbers of ranks drawn by ``job.seed``, and resumes it under each
    other. Exported from each, the model must compute the same logits to the bit."""

    strategies: Literal["auto"] | tuple[str, ...] = "auto"
    """Names from the plan's catalogue, ``run`` for the run's own, or ``auto`` (all that fit)."""

    loss_tolerance: float = 1e-5
    """Largest relative difference in loss, at any step: sums in another order round differently."""

    resume_tolerance: float = 1e-6
    """Largest relative difference in loss between a resumed run and the one that went on.
    They may also differ as much as undisturbed runs of the two strategies do."""

    grad_norm_tolerance: float = 1e-4
    """Largest relative difference in gradient norm at any step.
    By then Adam has magnified the differences of the weights."""

    generated_tokens: int = 8
    """Tokens that each strategy generates greedily after its steps; all must be equal."""

    case_timeout_s: float = 300.0
    """Time limit of one strategy, from building the model to its last token."""

    perturb: float = 0.0
    """Multiply all learning rates but the reference's by 1 + this, so that comparisons fail."""

    def unused_strategy(self, run: Run) -> str:
        """Return that the strategies named are others."""
        if self.strategies == "auto" or OWN_STRATEGY in self.strategies:
            return ""
        return f"job.strategies={','.join(self.strategies)} does not name {OWN_STRATEGY}, the strategy of the run"

    def validate(self) -> Iterator[ConfigError]:
        """Reject names that are in no catalogue, and counts that compare nothing."""
        yield from super().validate()
        yield from self.validate_minimum(1, "generated_tokens", "case_timeout_s")
        yield from self.validate_minimum(0, "loss_tolerance", "grad_norm_tolerance", "resume_tolerance")
        if self.strategies == "auto":
            return
        if not self.strategies:
            yield self.error("strategies", "names nothing to compare", "set job.strategies=auto")
        for name in self.strategies:
            if name not in (OWN_STRATEGY, *STRATEGIES):
                why, fix = f"there is no strategy {name} here", did_you_mean(name, (OWN_STRATEGY, *STRATEGIES))
                yield self.error("strategies", why, fix)

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject options that make equal strategies differ, and named strategies that cannot run."""
        if not isinstance(run.precision, Fp32Precision):
            why = "only fp32 is exact enough for the tolerances of job=verify"
            yield ConfigError("precision", run.precision.kind, why=why, fix="set precision=fp32")
        if getattr(run.model, "dropout", 0.0):
            why = "each rank draws its own dropout, so strategies would differ"
            yield ConfigError("model.dropout", run.model.dropout, why=why, fix="set model.dropout=0")  # type: ignore[attr-defined]
        for key, value in dropout_rates(run.model.stored_config() or {}).items():
            why = f"its config.json sets {key}={value:g}, and each rank draws its own dropout"
            fix = f"set {key} to 0 in a copy of the folder"
            yield ConfigError("model.name", run.model.name, why=why, fix=fix)
        if run.profile.kind == "true":
            why = "job=verify computes in processes that end after a few steps"
            yield ConfigError("profile", "true", why=why, fix="profile job=train with the strategy in question")
        try:
            choice: SelectedStrategies | ResumePairs = (
                select_pairs(self, run, world_size=world_size)
                if self.check == "resume"
                else select_strategies(self, run, world_size=world_size)
            )
        except ConfigError:
            return  # the batch does not come out even, which the plan refuses
        left_out = choice.left_out if self.strategies != "auto" or not choice.cases else {}
        for name, why in left_out.items():
            yield self.error("strategies", f"{name}: {why}", "leave it out, or set job.strategies=auto")

    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return the steps of all cases."""
        if self.check == "resume":
            chosen = select_pairs(self, run, world_size=world_size)
            return self.steps * (2 * len(chosen.sources) + len(chosen.pairs))
        return self.steps * (1 + len(select_strategies(self, run, world_size=world_size).cases))

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield what is compared: one process and strategies, or checkpoints."""
        if self.check == "resume":
            chosen = select_pairs(self, run, world_size=world_size)
            yield "saved", ", ".join(map(str, chosen.sources))
            yield "resumed", f"{counted(len(chosen.pairs), 'pair')}, ranks drawn by job.seed={self.seed}"
            return
        choice = select_strategies(self, run, world_size=world_size)
        yield "reference", SINGLE_PROCESS.describe(run, world_size=1, sequences=choice.sequences)
        for name, case in choice.cases.items():
            yield name, case.describe(run, world_size=world_size, sequences=choice.sequences)

    def warnings(self, run: Run, *, world_size: int) -> Iterator[str]:
        """Yield each strategy left out, and the reason."""
        by_reason: dict[str, list[str]] = defaultdict(list)
        chosen = select_pairs if self.check == "resume" else select_strategies
        for name, why in chosen(self, run, world_size=world_size).left_out.items():
            by_reason[why].append(name)
        for why, names in by_reason.items():
            yield f"not verified: {', '.join(names)}: {why}"
        if self.perturb:
            yield f"job.perturb={self.perturb:g}: every comparison is meant to fail"

    def files(self) -> Iterator[str]:
        """Yield the comparison, for programs and for people."""
        yield from ("verify.json", "verify.md")
