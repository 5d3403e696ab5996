"""The DeepSpeed pipeline engine: each rank holds the layers of one stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import log_softmax, nll_loss

from launcher.config.adapter_folder import ADAPTER_ATTRIBUTE
from launcher.config.parallel.deepspeed_pipeline import DeepSpeedPipeline
from launcher.data.rows import IGNORE_INDEX
from launcher.engines.base import Observer, StepResult, never_preempted
from launcher.engines.deepspeed.base import DeepSpeedEngineBase, choose_native_adam
from launcher.engines.distributed import TokenCount, num_labels
from launcher.engines.generate import greedy_decode
from launcher.engines.kept_zeros import linear_matrices
from launcher.engines.optimizer import parameter_names, set_rates
from launcher.engines.source_losses import sources_of_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from launcher.data.dataloader import MicroBatch
    from launcher.engines.context import Context
    from launcher.engines.deepspeed.masters import MasterState
    from launcher.engines.source_losses import TokenSources
    from launcher.profiling.performance import StepClock


class DeepSpeedPipelineEngine(DeepSpeedEngineBase):
    """One pipeline stage with whole weights, gradients and moments, or moments under ZeRO-1."""

    def __init__(self, context: Context, clock: StepClock) -> None:
        parallel = context.run.parallel
        assert isinstance(parallel, DeepSpeedPipeline), "this engine supports DeepSpeed's pipeline only"
        super().__init__(context, clock)
        from launcher.engines.deepspeed.pipeline_module import build_pipeline_module, parameters_counted_here

        self._loss = StageLoss(device=self.device)
        self.module, self._laid_out = build_pipeline_module(context, device=self.device, loss_of=self._loss)
        self._initialize(self.module, self._config(parallel), names=self._names())
        self._keep_zeros()
        # PipelineEngine averages over micro-batches and over pipelines side by side
        self._gain = context.batch.gradient_accumulation_steps * context.dims.data_parallel
        self._last = self.module.mpu().stage_to_global(parallel.stages - 1)
        self._shape: torch.Size | None = None
        self._clipping: PipelineClipping | None = None
        if parallel.stage == 0:
            self._clipping = PipelineClipping(
                list(self.module.parameters()),
                counted=parameters_counted_here(self.module),
                stages=self.module.mpu().get_pipe_parallel_group(),
                largest=context.run.batched_job.clip_norm,
            )
            self._engine.optimizer.register_step_pre_hook(self._clipping)

    def _config(self, parallel: DeepSpeedPipeline) -> dict[str, Any]:
        run = self._context.run
        return parallel.ds_config(
            batch=self._context.batch,
            clip_norm=run.batched_job.clip_norm,
            optimizer=run.optimizer,
            precision=run.precision,
            native_adam=choose_native_adam(self._context, parallel.zero, device=self.device),
        )

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        lr: float,
        max_loss: float | None = None,
        preempted: Callable[[], bool] = never_preempted,
    ) -> StepResult:
        """Pass DeepSpeed all micro-batches at once: forward, backward and update are one call."""
        assert max_loss is None, "the plan refuses to skip steps here"
        count = TokenCount(micro_batches, device=self.device, copies=self._context.dims.copies)
        set_rates(self._engine.optimizer, lr)
        self._expect(micro_batches[0].input_ids)
        self._loss.begin(weight=self._gain / count.total(), sources=self._sources(micro_batches))
        self._place(micro_batches)
        with self._clock.phase("pipeline"):
            self._engine.train_batch(_pairs(micro_batches))
        with self._clock.phase("optimizer"):
            return self._step_result(
                self._loss.total.item(),
                tokens=int(count.total()),
                norm=None if self._clipping is None else self._clipping.norm,
                preempted=preempted(),
            )

    def _expect(self, input_ids: Tensor) -> None:
        """Have the stages exchange shapes again if the shapes differ from those of the last time."""
        if input_ids.shape != self._shape:
            self._engine.reset_activation_shape()
            self._shape = input_ids.shape

    def _place(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Tell this stage the positions of the tokens; stages send each other hidden states alone."""
        found = (batch.position_ids for batch in micro_batches)
        self.module.positions.begin([None if ids is None else ids.to(self.device) for ids in found])

    def _sources(self, micro_batches: Sequence[MicroBatch]) -> Iterator[TokenSources | None]:
        """Yield where the losses of each micro-batch's tokens are added up."""
        for batch in micro_batches:
            labels = batch.labels if batch.sources is None else batch.labels.to(self.device)
            yield sources_of_tokens(self.by_source, batch.sources, labels)

    def loss_of(self, micro_batches: Sequence[MicroBatch], *, observe: Observer | None = None) -> tuple[float, int]:
        """Return the summed loss and the number of tokens on the last stage, and zeros on others."""
        assert observe is None, "the plan refuses metrics under pipelines"
        self._expect(micro_batches[0].input_ids)
        self._loss.begin(weight=torch.ones((), device=self.device), sources=self._sources(micro_batches))
        self._place(micro_batches)
        self._engine.eval_batch(
            _pairs(micro_batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches)
        )
        self.module.train()
        is_last = self._context.rank == self._last
        return self._loss.total.item(), num_labels(micro_batches) if is_last else 0

    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Continue greedily; every token is a pass through all stages over everything before it."""
        ends = self._laid_out.generation_config.eos_token_id
        ids = greedy_decode(self._next, input_ids.to(self.device), max_new_tokens=max_new_tokens, ends=ends)
        self.module.train()
        return ids

    def _next(self, input_ids: Tensor) -> Tensor:
        """Return the most likely next token of each sequence, from the last stage to all."""
        self._expect(input_ids)
        self.module.positions.begin([None])
        # it always adds up something as a loss, so it is given labels, and the loss is left alone
        _, logits = self._engine.eval_batch(
            iter([(input_ids, input_ids)]),
            return_logits=True,
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=1,
        )
        is_last = self._context.rank == self._last
        tokens = logits[:, -1].float().argmax(-1) if is_last else torch.empty_like(input_ids[:, -1])
        dist.broadcast(tokens, src=self._last, group=self.module.mpu().get_pipe_parallel_group())
        return tokens

    def _named_model(self) -> nn.Module:
        return self._laid_out

    @property
    def model_config(self) -> PreTrainedConfig:
        """Configuration of the whole model."""
        return self._laid_out.config

    @property
    def adapter_config(self) -> Mapping[str, Any] | None:
        """PEFT's config of the adapter that is trained."""
        found: Mapping[str, Any] | None = getattr(self._laid_out, ADAPTER_ATTRIBUTE, None)
        return found

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters of this stage under the names that the whole model has."""
        for name, parameter in self._laid_out.named_parameters():
            if not parameter.is_meta:
                yield name, parameter.detach().to("cpu", torch.float32)

    def linear_matrices(self) -> dict[str, nn.Parameter]:
        """Return those of this stage."""
        found = linear_matrices([self._laid_out])
        return {name: matrix for name, matrix in found.items() if not matrix.is_meta}

    def _names(self) -> dict[nn.Parameter, str]:
        """Return the parameters of this stage with their names in the whole model."""
        names = parameter_names([self._laid_out])
        return {parameter: name for parameter, name in names.items() if not parameter.is_meta}

    def _master_state(self) -> MasterState:
        from launcher.engines.deepspeed.masters import MasterState
        from launcher.engines.deepspeed.pipeline_module import parameters_counted_here

        names = self._names()
        counted = set(parameters_counted_here(self.module))
        elsewhere = [parameter for parameter in names if parameter not in counted]
        adapter_only = self._context.run.lora is not None
        return MasterState(self._engine.optimizer, names, saved_elsewhere=elsewhere, adapter_only=adapter_only)


def _pairs(micro_batches: Sequence[MicroBatch]) -> Any:
    return iter([(batch.input_ids, batch.labels) for batch in micro_batches])


class StageLoss:
    """The loss summed over labelled tokens: weighted for backward, plain for the report.

    Args:
        device: of the sum.
    """

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self.begin(weight=torch.ones((), device=device))

    def begin(self, *, weight: Tensor, sources: Iterable[TokenSources | None] = ()) -> None:
        """Reset the sum.

        Args:
            weight: turns means over micro-batches into the global batch's mean.
            sources: of the tokens of each micro-batch, in the order of the micro-batches.
        """
        self._weight, self._sources = weight, iter(sources)
        self.total = torch.zeros((), dtype=torch.float64, device=self._device)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return a micro-batch's weighted loss, fp32 scalar; logits (sequences, tokens, vocabulary)."""
        flat, log_probs = labels.flatten(), log_softmax(logits.flatten(0, 1).float(), dim=-1)
        loss = nll_loss(log_probs, flat, ignore_index=IGNORE_INDEX, reduction="sum")
        if (of_sources := next(self._sources, None)) is not None:
            losses = nll_loss(log_probs.detach(), flat, ignore_index=IGNORE_INDEX, reduction="none")
            of_sources.add(slice(None), losses, flat)
        self.total += loss.detach()
        return loss * self._weight


class PipelineClipping:
    """Gradient norm and clipping over all stages, if DeepSpeed wraps no optimizer.

    DeepSpeed would count the first stage alone.

    Args:
        parameters: of this stage.
        counted: those that no earlier stage holds too.
        stages: the ranks of this pipeline.
        largest: norm that gradients are clipped to; 0 leaves them as they are.
    """

    def __init__(
        self, parameters: list[nn.Parameter], *, counted: list[nn.Parameter], stages: Any, largest: float
    ) -> None:
        self._parameters, self._counted, self._stages, self._largest = parameters, counted, stages, largest
        self.norm: float | None = None

    def __call__(self, *step: object) -> None:
        """Take the norm of the whole gradient, already reduced, and clip this stage's share of it."""
        norm = nn.utils.get_total_norm([p.grad for p in self._counted if p.grad is not None]).double()
        square = norm.to(self._parameters[0].device) ** 2
        dist.all_reduce(square, group=self._stages)
        self.norm = square.sqrt().item()
        if self._largest and self.norm > self._largest:
            factor = self._largest / (self.norm + 1e-6)
            torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], factor)
