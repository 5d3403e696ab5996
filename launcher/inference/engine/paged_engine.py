"""The launcher's own engine: many sequences in one forward pass, on one rank or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import distributed as dist

from launcher.config.inference import EngineLimits
from launcher.config.model.image_text import is_image_text
from launcher.engines.distributed import choose_device, connect, disconnect
from launcher.inference.engine.adapter_loader import NO_FOLDERS, load_adapters
from launcher.inference.engine.base import (
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    GeneratedToken,
    InferenceEngine,
    InvalidRequest,
)
from launcher.inference.engine.block_manager import BLOCK_SIZE
from launcher.inference.engine.distributed import LeaderRunner, PipelinedRunner, follow_leader
from launcher.inference.engine.draft_lengths import DraftCounts, DraftLengths
from launcher.inference.engine.early_exit import EarlyExitDrafter, check_early_exit
from launcher.inference.engine.image_encoder import ImageEncoder, text_model_of
from launcher.inference.engine.kv_cache import PagedCache, num_kv_blocks
from launcher.inference.engine.layer_skipping import ExitStates
from launcher.inference.engine.model_loader import load_eos_token_ids, load_model_part
from launcher.inference.engine.model_runner import WHOLE_MODEL, KVSelfTest, ModelRunner, ModelStage
from launcher.inference.engine.output_processor import OutputProcessor, StepOutput
from launcher.inference.engine.scheduler import ScheduledStep, Scheduler, SchedulerCounts
from launcher.inference.engine.sequence import SequenceGroup, image_content
from launcher.inference.engine.step_plan import StepPlan
from launcher.inference.kernels.layers import replace_layers
from launcher.inference.kernels.low_rank import NO_ADAPTERS, AdapterSet
from launcher.profiling.profiler import NO_PROFILER, Profiler

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from launcher.config.run import Run
    from launcher.engines.context import Context
    from launcher.inference.engine.speculation import Drafter, DraftSampler


class StepRunner(Protocol):
    """Computes step plans."""

    @property
    def isolates(self) -> bool:
        """Whether other plans may be computed after one that failed."""

    def run(self, plan: StepPlan) -> Tensor:
        """Return the logits of sampled sequences, in order; (sampled sequences, vocabulary), fp32."""

    def close(self) -> None:
        """Free everything."""


class PagedEngine(InferenceEngine):
    """Schedules, computes and samples.

    Args:
        runner: computes the forward passes.
        limits: sizes of steps and batches.
        num_blocks: of the KV cache.
        max_model_len: longest sequence that the model takes.
        vocab_size: of the model.
        eos_token_ids: tokens that end a sequence.
        adapters: names of the adapters of the model, in the order of their numbers.
        make_drafter: makes what drafts tokens, from what chooses them; ``None`` drafts none.
        images: computes features of requests' images; ``None`` for a model that takes text alone.
        clock: seconds.
    """

    _active: dict[str, SequenceGroup]

    def __init__(
        self,
        runner: StepRunner,
        *,
        limits: EngineLimits,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        adapters: Sequence[str] = (),
        make_drafter: Callable[[DraftSampler], Drafter] | None = None,
        images: ImageEncoder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        longest = min(max_model_len, num_blocks * BLOCK_SIZE)
        super().__init__(limits, max_model_len=longest, vocab_size=vocab_size, num_blocks=num_blocks)
        self._runner, self._clock = runner, clock
        self.adapters = tuple(adapters)
        self._images, self.takes_images = images, images is not None
        self._encoding: list[SequenceGroup] = []
        """Requests with images whose features are not computed yet; they are not in the queue."""
        self._draft_lengths = DraftLengths(
            limits.speculation_tokens, max_model_len=longest, adaptive=limits.speculation_adaptive, clock=clock
        )
        drafts = None if make_drafter is None else self._draft_lengths
        self._scheduler = Scheduler(limits, num_blocks=num_blocks, drafts=drafts)
        self._output_processor = OutputProcessor(self._scheduler, max_model_len=longest, eos_token_ids=eos_token_ids)
        self._drafter = None if make_drafter is None else make_drafter(self._output_processor)
        self._drafted = DraftCounts()
        self._steps = self._generated = 0
        self._stepped_s = clock()

    def _accept(self, request: EngineRequest) -> None:
        """Queue a request; one with images once their features are computed."""
        if not self._active:
            self._stepped_s = self._clock()
        adapter = self.adapters.index(request.adapter) + 1 if request.adapter else 0
        group = SequenceGroup(request, self._clock(), adapter=adapter)
        if request.images:
            assert self._images is not None, "checked on arrival"
            try:
                group.images = self._images.add(request)
            except ValueError as error:
                raise InvalidRequest("messages", str(error)) from error
            group.prompt_content = image_content(request, image_token=self._images.token_id)
            self._encoding.append(group)
        else:
            self._scheduler.waiting.add(group)
        self._active[request.id] = group

    def step(self) -> Sequence[EngineOutput]:
        """Compute one step."""
        outputs = self._expired()
        if self._encoding:
            outputs += self._encode_image()
        step = self._scheduler.schedule(self._clock())
        if step is not None:
            with self.profiler.step():
                outputs += self._compute(step)
            self._steps += 1
        self._stepped_s = self._clock()
        return outputs

    def stats(self) -> EngineStats:
        """Return its counts."""
        counts = self._scheduler.counts
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + len(self._encoding),
            kv_cache_tokens=self._scheduler.kv_cache_tokens,
            kv_cache_capacity=self._num_blocks * BLOCK_SIZE,
            steps_total=self._steps,
            prompt_tokens_total=counts.prompt_tokens,
            generated_tokens_total=self._generated,
            padding_tokens_total=counts.padding_tokens,
            prefix_hit_tokens_total=counts.prefix_hits,
            prefix_query_tokens_total=counts.prefix_queries,
            preemptions_total=counts.preemptions,
            drafts_total=self._drafted.drafts,
            draft_tokens_total=self._drafted.draft_tokens,
            accepted_tokens_total=self._drafted.accepted_tokens,
            decoded_tokens_total=self._drafted.tokens,
            decoding_passes_total=self._drafted.passes,
            since_step_s=self._clock() - self._stepped_s if self._active else 0.0,
        )

    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Run sequences of each shape; they do not count."""
        self._run_shapes(shapes)
        self._scheduler.counts = SchedulerCounts()
        self._drafted = DraftCounts()
        self._steps = self._generated = 0

    def close(self) -> None:
        """Free everything."""
        self._runner.close()

    def _expired(self) -> list[EngineOutput]:
        """Finish the requests that were cancelled or whose deadline has passed."""
        now = self._clock()
        outputs = []
        for name, group in list(self._active.items()):
            if name in self._cancelled:
                outputs.append(self._finish(group, "cancelled"))
            elif group.request.is_expired(now - group.arrived_s, is_started=group.is_started):
                outputs.append(self._finish(group, "timeout"))
        self._cancelled.clear()
        return outputs

    def _encode_image(self) -> list[EngineOutput]:
        """Compute the features of one image: other requests wait for no more.

        A request whose image fails ends.
        """
        group = min(self._encoding, key=self._scheduler.rank)
        assert self._images is not None, "they have images"
        try:
            if self._images.encode(group.images):
                self._encoding.remove(group)
                self._scheduler.waiting.add(group)
        except Exception as error:  # noqa: BLE001  (any error: the other requests continue)
            return [self._finish(group, "error", f"{type(error).__name__}: {error}")]
        return []

    def _compute(self, step: ScheduledStep) -> list[EngineOutput]:
        """Run a step; where it fails, run each request of it alone, to find the one at fault."""
        try:
            verified = step
            if self._drafter is not None and step.draft_lengths:
                verified = step.with_drafts(self._drafter.draft(step), first_layer=self._drafter.first_layer)
            logits = self._runner.run(verified.plan)
        except Exception as error:  # any error: the other requests continue
            if not self._runner.isolates:
                raise
            groups = list(dict.fromkeys(sequence.group for sequence in step.sequences))
            if len(groups) == 1:
                return [self._finish(groups[0], "error", f"{type(error).__name__}: {error}")]
            return [output for group in groups for output in self._compute(_part_of_group(step, group))]
        self._scheduler.mark_computed(verified)
        outcomes = self._output_processor.process(verified, logits)
        if self._drafter is not None:
            self._scheduler.roll_back(verified)
            self._count_drafts(verified, outcomes, cost=self._drafter.cost)
        return [self._report(outcome) for outcome in outcomes]

    def _count_drafts(self, step: ScheduledStep, outcomes: Sequence[StepOutput], *, cost: float) -> None:
        """Count what the decoding sequences of a step got, and how they got it."""
        tokens = {outcome.group: [token.id for token in outcome.tokens] for outcome in outcomes}
        accepted, counts, before = {}, self._drafted, self._drafted.tokens
        decoding = [index for index in range(len(step.sequences)) if step.is_decoding(index)]
        for index in decoding:
            group, draft = step.sequences[index].group, step.drafts[index] if step.drafts else None
            got = tokens.get(group, [])
            if group.max_num_seqs > 1:
                continue
            counts.tokens += len(got)
            counts.passes += 1
            if draft is not None and draft.tokens:
                taken = sum(one == other for one, other in zip(got, draft.tokens, strict=False))
                counts.drafts += 1
                counts.draft_tokens += len(draft.tokens)
                counts.accepted_tokens += taken
                counts.passes += cost * len(draft.tokens)
                accepted[group] = (len(draft.tokens), taken)
        is_timed = len(decoding) == len(step.sequences)
        self._draft_lengths.record(accepted, tokens=counts.tokens - before, is_timed=is_timed)

    def _report(self, outcome: StepOutput) -> EngineOutput:
        group = outcome.group
        self._generated += len(outcome.tokens)
        if outcome.finish_reason is not None:
            return self._finish(group, outcome.finish_reason, outcome.error, param=outcome.param, tokens=outcome.tokens)
        return self._output(group, tokens=outcome.tokens)

    def _finish(
        self,
        group: SequenceGroup,
        finish_reason: FinishReason,
        error: str = "",
        *,
        param: str = "",
        tokens: tuple[GeneratedToken, ...] = (),
    ) -> EngineOutput:
        if group in self._encoding:
            self._encoding.remove(group)
        else:
            self._scheduler.finish(group)
        if self._images is not None and group.images:
            self._images.release(group.images)
        self._output_processor.release(group)
        self._draft_lengths.release(group)
        del self._active[group.request.id]
        return self._output(group, tokens=tokens, finish_reason=finish_reason, error=error, param=param)

    def _output(
        self,
        group: SequenceGroup,
        *,
        tokens: tuple[GeneratedToken, ...],
        finish_reason: FinishReason | None = None,
        **why: str,
    ) -> EngineOutput:
        num_cached = 0 if group.is_reported else group.num_cached_tokens
        group.is_reported = True
        return EngineOutput(
            request_id=group.request.id, tokens=tokens, finish_reason=finish_reason, num_cached_tokens=num_cached, **why
        )


def _part_of_group(step: ScheduledStep, group: SequenceGroup) -> ScheduledStep:
    """Return the part of a step that is one request's; copying its blocks again does no harm."""
    pairs = [
        (sequence, part)
        for sequence, part in zip(step.sequences, step.plan.segments, strict=True)
        if sequence.group is group
    ]
    plan = StepPlan(tuple(part for _, part in pairs), copies=step.plan.copies)
    return ScheduledStep(plan, tuple(sequence for sequence, _ in pairs))


def make_paged_engine(
    run: Run,
    *,
    limits: EngineLimits,
    rank: int,
    world_size: int,
    heartbeat: Callable[[], None],
    local_rank: int = 0,
    adapters: Mapping[str, str] = NO_FOLDERS,
) -> InferenceEngine:
    """Return the engine of the first rank, with its model built and checked.

    The other ranks call ``follow_paged_engine`` at the same time.

    Args:
        run: what to build, and how it is computed.
        limits: sizes of steps and batches.
        rank: of this process among those that hold the model, 0.
        world_size: processes that hold the model between them; 1 where each holds it whole. They have joined torch's
            process group, and are all of it.
        heartbeat: called while the model is built.
        local_rank: index of its device on this machine.
        adapters: folders of adapters, by name; only where one process holds the model whole.

    Raises:
        ConfigError: the engine cannot hold this model exactly, or cannot serve it with the rest of the run.
        EnvironmentProblem: weights cannot be fetched.
    """
    assert rank == 0, "the other ranks follow"
    model, stage = load_model_part(
        run, rank=0, world_size=world_size, device=choose_device(local_rank), heartbeat=heartbeat
    )
    eos_token_ids = load_eos_token_ids(run, model, heartbeat=heartbeat)
    assert world_size == 1 or not adapters, "refused in the plan"
    return paged_engine_for(
        model,
        limits=limits,
        eos_token_ids=eos_token_ids,
        stage=stage,
        world_size=world_size,
        adapters=load_adapters(model, adapters, name=run.model.name, heartbeat=heartbeat),
        heartbeat=heartbeat,
    )


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
    """Execute the first rank's plans on another rank until the engine is closed.

    Arguments are those of :func:`make_paged_engine`.
    """
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
    eos_token_ids: tuple[int, ...],
    stage: ModelStage = WHOLE_MODEL,
    world_size: int = 1,
    kernels: bool = True,
    adapters: AdapterSet = NO_ADAPTERS,
    heartbeat: Callable[[], None] = lambda: None,
) -> PagedEngine:
    """Return the launcher's own engine around a model.

    Args:
        model: in inference mode; its layers, of an image-text model those of its text model, may be replaced.
        limits: sizes of steps and batches.
        eos_token_ids: tokens that end a sequence.
        stage: which one it is.
        world_size: ranks that hold slices or stages of it.
        kernels: whether layers are replaced by compiled ones where there are any.
        adapters: of the model's layers.
        heartbeat: called meanwhile.

    Raises:
        ConfigError: it cannot hold the model exactly.
    """
    images = ImageEncoder(model) if is_image_text(model.config.to_dict()) else None
    runner, num_blocks = _make_runner(
        model if images is None else text_model_of(model),
        stage,
        limits=limits,
        world_size=world_size,
        kernels=kernels,
        adapters=adapters,
        images=images,
        heartbeat=heartbeat,
    )
    config = model.config.get_text_config()
    runs: StepRunner = runner
    if world_size > 1:
        group = dist.new_group(backend="gloo")
        runs = LeaderRunner(PipelinedRunner(runner, group) if stage.count > 1 else runner, group)

    def early_exit(sampler: DraftSampler) -> EarlyExitDrafter:
        num_layers = config.num_hidden_layers
        return EarlyExitDrafter(runs, sampler, exit_layer=limits.exit_layer(num_layers), num_layers=num_layers)

    return PagedEngine(
        runs,
        limits=limits,
        num_blocks=num_blocks,
        max_model_len=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        eos_token_ids=eos_token_ids,
        adapters=adapters.names,
        make_drafter=early_exit if limits.speculation == "early_exit" else None,
        images=images,
    )


def _make_runner(
    model: PreTrainedModel,
    stage: ModelStage,
    *,
    limits: EngineLimits,
    world_size: int,
    kernels: bool,
    heartbeat: Callable[[], None],
    adapters: AdapterSet = NO_ADAPTERS,
    images: ImageEncoder | None = None,
) -> tuple[ModelRunner, int]:
    """Return the runner of plans on this rank, and the number of KV blocks of every rank."""
    self_test = KVSelfTest(model, stage)
    self_test.install(model)
    num_blocks = num_kv_blocks(limits, self_test.shapes, model)
    if world_size > 1:
        least = torch.tensor([num_blocks], device=model.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        num_blocks = int(least)
    cache = PagedCache(self_test.shapes, num_blocks=num_blocks, dtype=model.dtype, device=model.device)
    runner = ModelRunner(model, cache, stage, adapters, images)
    if kernels and world_size == stage.count:  # slices of matrices are computed by torch
        swapped = replace_layers(model, cache, adapters=adapters, sparse=limits.sparse_kernels, heartbeat=heartbeat)
        difference = self_test.difference(runner)
        if not difference <= self_test.tolerance(model):
            swapped.undo()
            cache.kernels = None
            swapped.what = f"the model's own layers: compiled ones differ by {difference:.2g} of its logits"
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"engine: {swapped.what}", flush=True)
    adapters.wrap(model)
    if limits.speculation == "early_exit":
        assert stage.count == 1, "refused in the plan"
        runner.exits = ExitStates(model)
        check_early_exit(
            runner,
            exit_layer=limits.exit_layer(model.config.get_text_config().num_hidden_layers),
            family=model.config.model_type,
            vocab_size=model.config.get_text_config().vocab_size,
            tolerance=self_test.tolerance(model),
        )
    return runner, num_blocks


def make_engine_across_ranks(
    context: Context, *, limits: EngineLimits, heartbeat: Callable[[], None]
) -> InferenceEngine | None:
    """Return the engine on the first rank; others execute its plans until it is closed.

    Args:
        context: of this rank, which joins the others and, where it is not the first, leaves them again.
        limits: sizes of steps and batches.
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
