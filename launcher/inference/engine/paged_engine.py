"""The launcher's own engine: many sequences in one forward pass, on one rank or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import distributed as dist

from launcher.config.inference import EngineLimits
from launcher.config.sampling import SamplingParams
from launcher.engines.distributed import choose_device, connect, disconnect
from launcher.inference.engine.base import (
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    GeneratedToken,
    InferenceEngine,
    check_request,
)
from launcher.inference.engine.block_manager import BLOCK_SIZE
from launcher.inference.engine.distributed import LeaderRunner, PipelinedRunner, follow_leader
from launcher.inference.engine.kv_cache import PagedCache, num_kv_blocks
from launcher.inference.engine.model_loader import end_of_sequence_ids, load_model_part
from launcher.inference.engine.model_runner import WHOLE_MODEL, KVSelfTest, ModelRunner, ModelStage
from launcher.inference.engine.output_processor import OutputProcessor, StepOutput
from launcher.inference.engine.scheduler import ScheduledStep, Scheduler, SchedulerCounts
from launcher.inference.engine.sequence import SequenceGroup
from launcher.inference.engine.step_plan import StepPlan
from launcher.inference.kernels.layers import replace_layers
from launcher.profiling.profiler import NO_PROFILER, Profiler

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from launcher.config.run import Run
    from launcher.engines.context import Context


class StepRunner(Protocol):
    """What computes plans."""

    @property
    def isolates(self) -> bool:
        """Whether another plan may be tried after one that failed."""

    def run(self, plan: StepPlan) -> Tensor:
        """Return the scores that are asked for, in order; (wanted, vocabulary), fp32."""

    def close(self) -> None:
        """Give everything back."""


class PagedEngine(InferenceEngine):
    """Schedules, has computed, samples.

    Args:
        runner: computes.
        limits: how much at a time.
        num_pages: room for keys and values.
        context: most tokens of a sequence that the model takes.
        vocab_size: of the model.
        ends: tokens that end a sequence.
        clock: seconds.
    """

    def __init__(
        self,
        runner: StepRunner,
        *,
        limits: EngineLimits,
        num_pages: int,
        context: int,
        vocab_size: int,
        ends: Sequence[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner, self._limits, self._clock = runner, limits, clock
        self._context = min(context, num_pages * BLOCK_SIZE)
        self._num_pages, self._vocab_size = num_pages, vocab_size
        self._scheduler = Scheduler(limits, num_pages=num_pages)
        self._continuing = OutputProcessor(self._scheduler, context=self._context, ends=ends)
        self._tasks: dict[str, SequenceGroup] = {}
        self._cancelled: set[str] = set()
        self._steps = self._generated = 0
        self._stepped_s = clock()

    @property
    def context(self) -> int:
        """Most tokens of a sequence: what the model takes, or the room where that is less."""
        return self._context

    def add(self, request: EngineRequest) -> None:
        """Queue a request, or refuse it."""
        check_request(
            request,
            known=self._tasks,
            context=self._context,
            vocab_size=self._vocab_size,
            num_pages=self._num_pages,
            max_num_seqs=self._limits.max_num_seqs,
        )
        if not self._tasks:
            self._stepped_s = self._clock()
        task = SequenceGroup(request, self._clock())
        self._tasks[request.id] = task
        self._scheduler.waiting.add(task)

    def cancel(self, request_id: str) -> None:
        """End a request before the next step."""
        if request_id in self._tasks:
            self._cancelled.add(request_id)

    def step(self) -> Sequence[EngineOutput]:
        """Go one step further."""
        updates = self._overdue()
        step = self._scheduler.step(self._clock())
        if step is not None:
            with self.profiler.step():
                updates += self._compute(step)
            self._steps += 1
        self._stepped_s = self._clock()
        return updates

    def stats(self) -> EngineStats:
        """Return where it stands."""
        counts = self._scheduler.counts
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_cache_tokens=self._scheduler.held_tokens,
            kv_cache_capacity=self._num_pages * BLOCK_SIZE,
            steps_total=self._steps,
            prompt_tokens_total=counts.prompt_tokens,
            generated_tokens_total=self._generated,
            padding_tokens_total=counts.padding_tokens,
            prefix_hit_tokens_total=counts.prefix_hits,
            prefix_query_tokens_total=counts.prefix_queries,
            preemptions_total=counts.preemptions,
            since_step_s=self._clock() - self._stepped_s if self._tasks else 0.0,
        )

    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Have sequences of each shape go through, one shape after the other, cut to what fits."""
        assert not self._tasks, "warming up is for before the first request"
        for number, (sequences, tokens) in enumerate(shapes):
            for index in range(min(sequences, self._limits.max_num_seqs)):
                prompt = tuple(
                    (number + index + place) % self._vocab_size for place in range(min(tokens, self._context - 2))
                )
                sampling = SamplingParams(max_tokens=2, ignore_eos=True)
                self.add(EngineRequest(id=f"warm-up {number} {index}", prompt=prompt or (0,), sampling=sampling))
            while self._tasks:
                self.step()
        self._scheduler.counts = SchedulerCounts()
        self._steps = self._generated = 0

    def close(self) -> None:
        """Give everything back."""
        self._runner.close()

    def _overdue(self) -> list[EngineOutput]:
        """End what was cancelled or is out of time."""
        now = self._clock()
        updates = []
        for name, task in list(self._tasks.items()):
            request, age_s = task.request, now - task.arrived_s
            limits = (request.deadline_s, None if task.begun else request.queue_deadline_s)
            if name in self._cancelled:
                updates.append(self._end(task, "cancelled"))
            elif any(limit is not None and age_s > limit for limit in limits):
                updates.append(self._end(task, "timeout"))
        self._cancelled.clear()
        return updates

    def _compute(self, step: ScheduledStep) -> list[EngineOutput]:
        """Run a step; where it fails, run what each request has in it alone, to tell whose fault it is."""
        try:
            scores = self._runner.run(step.plan)
        except Exception as error:  # whatever it is, the other requests go on
            if not self._runner.isolates:
                raise
            tasks = list(dict.fromkeys(row.task for row in step.rows))
            if len(tasks) == 1:
                return [self._end(tasks[0], "error", f"{type(error).__name__}: {error}")]
            return [update for task in tasks for update in self._compute(_part_of_group(step, task))]
        self._scheduler.computed(step)
        return [self._report(outcome) for outcome in self._continuing.go_on(step, scores)]

    def _report(self, outcome: StepOutput) -> EngineOutput:
        task = outcome.task
        self._generated += len(outcome.tokens)
        if outcome.finish is not None:
            return self._end(task, outcome.finish, outcome.problem, field=outcome.field, tokens=outcome.tokens)
        return self._update(task, tokens=outcome.tokens)

    def _end(
        self,
        task: SequenceGroup,
        finish: FinishReason,
        problem: str = "",
        *,
        field: str = "",
        tokens: tuple[GeneratedToken, ...] = (),
    ) -> EngineOutput:
        self._scheduler.finish(task)
        self._continuing.forget(task)
        del self._tasks[task.request.id]
        return self._update(task, tokens=tokens, finish=finish, problem=problem, field=field)

    def _update(
        self, task: SequenceGroup, *, tokens: tuple[GeneratedToken, ...], finish: FinishReason | None = None, **why: str
    ) -> EngineOutput:
        cached = 0 if task.told else task.cached_tokens
        task.told = True
        return EngineOutput(request=task.request.id, tokens=tokens, finish=finish, cached_tokens=cached, **why)


def _part_of_group(step: ScheduledStep, task: SequenceGroup) -> ScheduledStep:
    """Return what one task has in a step; pages have been copied by then, or are copied once more."""
    pairs = [(row, part) for row, part in zip(step.rows, step.plan.segments, strict=True) if row.task is task]
    plan = StepPlan(tuple(part for _, part in pairs), copies=step.plan.copies)
    return ScheduledStep(plan, tuple(row for row, _ in pairs))


def make_paged_engine(
    run: Run, *, limits: EngineLimits, rank: int, world_size: int, heartbeat: Callable[[], None], local_rank: int = 0
) -> InferenceEngine:
    """Return the engine of the first rank, with its model built and checked; the others call ``follow`` meanwhile.

    Args:
        run: what to build, and how it is computed.
        limits: how much at a time.
        rank: of this process among those that hold the model, 0.
        world_size: processes that hold the model between them; 1 where each holds it whole. They have joined torch's
            process group, and are all of it.
        heartbeat: called while the model is built.
        local_rank: index of its device on this machine.

    Raises:
        ConfigError: the engine cannot hold this model exactly, or cannot serve it with the rest of the run.
        EnvironmentProblem: weights cannot be fetched.
    """
    assert rank == 0, "the other ranks follow"
    model, stage = load_model_part(
        run, rank=0, world_size=world_size, device=choose_device(local_rank), heartbeat=heartbeat
    )
    ends = end_of_sequence_ids(run, model, heartbeat=heartbeat)
    return paged_engine_for(model, limits=limits, ends=ends, stage=stage, world_size=world_size, heartbeat=heartbeat)


def follow_paged_engine(
    run: Run,
    *,
    limits: EngineLimits,
    rank: int,
    world_size: int,
    heartbeat: Callable[[], None],
    local_rank: int = 0,
    profiler: Profiler = NO_PROFILER,
) -> None:
    """Compute on a rank other than the first what its engine plans, until that is closed; arguments as above."""
    assert rank > 0, "the first rank leads"
    model, stage = load_model_part(
        run, rank=rank, world_size=world_size, device=choose_device(local_rank), heartbeat=heartbeat
    )
    runner, _ = _make_runner(model, stage, limits=limits, world_size=world_size, kernels=True, heartbeat=heartbeat)
    group = dist.new_group(backend="gloo")
    follow_leader(
        PipelinedRunner(runner, group) if stage.count > 1 else runner, group, heartbeat=heartbeat, profiler=profiler
    )


def paged_engine_for(
    model: PreTrainedModel,
    *,
    limits: EngineLimits,
    ends: tuple[int, ...],
    stage: ModelStage = WHOLE_MODEL,
    world_size: int = 1,
    kernels: bool = True,
    heartbeat: Callable[[], None] = lambda: None,
) -> PagedEngine:
    """Return the launcher's own engine around a model.

    Args:
        model: in inference mode; its layers may be replaced.
        limits: how much at a time.
        ends: tokens that end a sequence.
        stage: which one it is.
        world_size: ranks that hold slices or stages of it.
        kernels: whether layers are replaced by compiled ones where there are any.
        heartbeat: called meanwhile.

    Raises:
        ConfigError: it cannot hold the model exactly.
    """
    runner, pages = _make_runner(
        model, stage, limits=limits, world_size=world_size, kernels=kernels, heartbeat=heartbeat
    )
    config = model.config.get_text_config()
    runs: StepRunner = runner
    if world_size > 1:
        group = dist.new_group(backend="gloo")
        runs = LeaderRunner(PipelinedRunner(runner, group) if stage.count > 1 else runner, group)
    return PagedEngine(
        runs,
        limits=limits,
        num_pages=pages,
        context=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        ends=ends,
    )


def _make_runner(
    model: PreTrainedModel,
    stage: ModelStage,
    *,
    limits: EngineLimits,
    world_size: int,
    kernels: bool,
    heartbeat: Callable[[], None],
) -> tuple[ModelRunner, int]:
    """Return what computes plans on this rank, and how many pages all ranks have room for."""
    sample = KVSelfTest(model, stage)
    sample.use_pages(model)
    pages = num_kv_blocks(limits, sample.shapes, model)
    if world_size > 1:
        least = torch.tensor([pages], device=model.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        pages = int(least)
    cache = PagedCache(sample.shapes, num_pages=pages, dtype=model.dtype, device=model.device)
    runner = ModelRunner(model, cache, stage)
    if kernels and world_size == stage.count:  # slices of matrices are computed by torch
        swapped = replace_layers(model, cache, heartbeat=heartbeat)
        difference = sample.difference(runner)
        if not difference <= sample.tolerance(model):
            swapped.undo()
            cache.kernels = None
            swapped.what = f"the model's own layers: compiled ones differ by {difference:.2g} of its scores"
        print(f"engine: {swapped.what}", flush=True)
    return runner, pages


def make_engine_across_ranks(
    context: Context, *, limits: EngineLimits, heartbeat: Callable[[], None]
) -> InferenceEngine | None:
    """Return the engine on the first rank; the others compute in here until it is closed, and get nothing.

    Args:
        context: of this rank, which joins the others and, where it is not the first, leaves them again.
        limits: how much at a time.
        heartbeat: called while the model is built, and by those that wait for something to compute.

    Raises:
        ConfigError: the engine cannot hold this model exactly, or cannot serve it with the rest of the run.
        EnvironmentProblem: weights cannot be fetched.
    """
    run, rank, world_size, local_rank = context.run, context.rank, context.world_size, context.local_rank
    connect(context, choose_device(local_rank))
    if context.is_main:
        return make_paged_engine(
            run, limits=limits, rank=rank, world_size=world_size, heartbeat=heartbeat, local_rank=local_rank
        )
    sizes = {"rank": rank, "world_size": world_size, "local_rank": local_rank}
    follow_paged_engine(run, limits=limits, heartbeat=heartbeat, profiler=context.profiler, **sizes)
    disconnect()
    return None
