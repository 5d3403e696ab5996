"""DeepSpeed's pipeline: micro-batches flow through stages, and each rank holds the layers of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from launcher.engines.base import Engine, StepResult, nobody_asks
from launcher.engines.deepspeed_common import load_checkpoint, save_checkpoint, step_result
from launcher.engines.distributed import TokenCount, choose_device, disconnect, num_labels
from launcher.engines.greedy import greedily
from launcher.engines.groups import decay_groups
from launcher.engines.held import deepspeed_state
from launcher.engines.native import allow_fp16, connect_deepspeed, prepare_environment, quiet, take_native_adam
from launcher.engines.stage_numbers import Clipping, SummedLoss
from launcher.parallel.deepspeed_pipeline import DeepSpeedPipeline

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.data.loader import MicroBatch
    from launcher.parallel.base import StateBytes
    from launcher.training.clock import Clock


class DeepSpeedPipelineEngine(Engine):
    """One stage of a pipeline. Weights, gradients and moments are whole on it, or ZeRO-1 shares out the moments."""

    def __init__(self, context: Context, clock: Clock) -> None:
        parallel = context.run.parallel
        assert isinstance(parallel, DeepSpeedPipeline), "this engine carries out DeepSpeed's pipeline only"
        prepare_environment(context)
        import deepspeed

        quiet()
        self._clock, self._context = clock, context
        self.device = choose_device(context.local_rank)
        connect_deepspeed(context, device=self.device)
        allow_fp16(self.device)
        from launcher.engines.staged import counted_once, staged_model

        self._loss = SummedLoss(device=self.device)
        self.module, self._laid_out = staged_model(context, device=self.device, loss_of=self._loss)
        self._engine, _, _, _ = deepspeed.initialize(
            model=self.module,
            model_parameters=decay_groups(self.module, weight_decay=context.run.optimizer.weight_decay),
            config=self._config(parallel),
            dist_init_required=False,
        )
        # PipelineEngine averages over micro-batches and over pipelines side by side
        self._gain = context.batch.accumulation * context.degrees.data_parallel
        self._last = self.module.mpu().stage_to_global(parallel.stages - 1)
        self._shape: torch.Size | None = None
        self._clipping: Clipping | None = None
        if parallel.stage == 0:
            self._clipping = Clipping(
                list(self.module.parameters()),
                counted=counted_once(self.module),
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
            native_adam=take_native_adam(self._context, parallel.zero, device=self.device),
        )

    def step(
        self, micro_batches: Sequence[MicroBatch], *, lr: float, preempted: Callable[[], bool] = nobody_asks
    ) -> StepResult:
        """Hand DeepSpeed all micro-batches at once: forward, backward and update are one call."""
        count = TokenCount(micro_batches, device=self.device, copies=self._context.degrees.copies)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._expect(micro_batches[0].input_ids)
        self._loss.begin(weight=self._gain / count.total())
        with self._clock.phase("pipeline"):
            self._engine.train_batch(_pairs(micro_batches))
        with self._clock.phase("optimizer"):
            return step_result(
                self._engine,
                self._loss.total.item(),
                tokens=int(count.total()),
                norm=None if self._clipping is None else self._clipping.norm,
                preempted=preempted(),
                device=self.device,
            )

    def _expect(self, input_ids: Tensor) -> None:
        """Have the stages tell each other anew what they send, where that is of another shape than the last time."""
        if input_ids.shape != self._shape:
            self._engine.reset_activation_shape()
            self._shape = input_ids.shape

    def loss_of(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Return the summed loss and the number of tokens on the last stage, which has them, and zeros on others."""
        self._expect(micro_batches[0].input_ids)
        self._loss.begin(weight=torch.ones((), device=self.device))
        self._engine.eval_batch(
            _pairs(micro_batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches)
        )
        self.module.train()
        is_last = self._context.rank == self._last
        return self._loss.total.item(), num_labels(micro_batches) if is_last else 0

    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Continue greedily; every token is a pass through all stages over everything before it."""
        ends = self._laid_out.generation_config.eos_token_id
        ids = greedily(self._next, input_ids.to(self.device), max_new_tokens=max_new_tokens, ends=ends)
        self.module.train()
        return ids

    def _next(self, input_ids: Tensor) -> Tensor:
        """Return the most likely next token of each sequence, from the last stage to all."""
        self._expect(input_ids)
        # it adds up what stands for a loss in any case, so it is given labels, and the loss is left alone
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

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters of this stage under the names that the whole model has."""
        for name, parameter in self._laid_out.named_parameters():
            if not parameter.is_meta:
                yield name, parameter.detach().to("cpu", torch.float32)

    def held(self) -> StateBytes:
        """Count what is in memory, partitions as such; what lies on NVMe is not."""
        return deepspeed_state(self._engine, device=self.device)

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's checkpoint (a file for each layer, optimiser partitions) and this rank's generators."""
        save_checkpoint(self._engine, folder, context=self._context, device=self.device)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote at the same world size, stages and cut.

        Raises:
            JobError: the folder holds no checkpoint of DeepSpeed.
        """
        with torch.no_grad():  # tied weights are broadcast in place
            load_checkpoint(self._engine, folder, context=self._context, device=self.device)

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks, and the process group."""
        self._engine.destroy()
        disconnect()


def _pairs(micro_batches: Sequence[MicroBatch]) -> Any:
    return iter([(batch.input_ids, batch.labels) for batch in micro_batches])
