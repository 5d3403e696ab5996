"""The torch engine: one process, replicas under DDP, or shards under FSDP2."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from launcher.config.parallel.data_parallel import Fsdp
from launcher.engines.base import Engine, Observer, StepResult, WholeModel, never_preempted
from launcher.engines.distributed import DTYPES, TokenCount, choose_device, connect, disconnect, num_items
from launcher.engines.early_exit import early_exit_loss
from launcher.engines.generate import generate_greedily
from launcher.engines.loss import loss_function, token_loss_sum
from launcher.engines.model_state import torch_state_bytes
from launcher.engines.optimizer import OptimizerStep
from launcher.engines.parallelize import ModelLayout, ReplicatedModel, ShardedModel
from launcher.engines.preferences import preference_loss
from launcher.engines.state import (
    fill_tensors,
    optimizer_tensors,
    restore_rng,
    rng_tensors,
    saved_tensors,
    shards_of,
)

if TYPE_CHECKING:
    from launcher.checkpoint.tensors import Shard, StoredState
    from launcher.data.dataloader import MicroBatch
    from launcher.engines.context import Context
    from launcher.profiling.performance import StepClock
    from launcher.protocol.plan import StateBytes


class TorchEngine(Engine):
    """fp32 master weights, gradients and moments; passes in the run's precision."""

    def __init__(self, context: Context, clock: StepClock) -> None:
        run = context.run
        self._clock, self._copies = clock, context.dims.copies
        self.device = choose_device(context.local_rank)
        connect(context, self.device)
        sharded = isinstance(run.parallel, Fsdp)
        self._layout: ModelLayout = (
            ShardedModel(context, self.device) if sharded else ReplicatedModel(context, self.device)
        )
        self.module = self._layout.module
        self._dtype = DTYPES[run.precision.compute]
        self._update = OptimizerStep([self.module], run, device=self.device)
        self._loss = loss_function(run.batched_job)
        self.preferences = preference_loss(run.batched_job, device=self.device)
        self._exits = early_exit_loss(run.batched_job, self.module)
        self._adapter_only = run.lora is not None
        self._state_names, self._trains = run.optimizer.saved_names, run.batched_job.trains

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        lr: float,
        max_loss: float | None = None,
        preempted: Callable[[], bool] = never_preempted,
    ) -> StepResult:
        """Accumulate gradients of the loss, weighted by the global batch's tokens, then update."""
        own = self._own(micro_batches)
        count = TokenCount(own, device=self.device, copies=self._copies)
        own_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        last = len(own) - 1
        for number, micro_batch in enumerate(own):
            reduced = self._layout.without_reduction() if number < last else contextlib.nullcontext()
            with reduced, self._split(micro_batches[number]):
                with self._clock.phase("forward"), self._autocast():
                    loss = token_loss_sum(
                        self._layout.forward,
                        micro_batch,
                        device=self.device,
                        function=self._loss,
                        preferences=self.preferences,
                        by_source=self.by_source,
                        exits=self._exits,
                    )
                with self._clock.phase("backward"):
                    own_sum += loss.detach()
                    (loss * (self._layout.averaged_over * self._update.scale.value / count.total())).backward()
        with self._clock.phase("optimizer"):
            return self._update.apply(
                own_sum, count.total(), lr=lr, max_loss=max_loss, preempted=preempted(), counted=self._copies
            )

    def _own(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Return the tokens that this rank computes with."""
        sequence = self._layout.sequence
        return list(micro_batches) if sequence is None else [sequence.share_of(batch) for batch in micro_batches]

    def _split(self, whole: MicroBatch) -> contextlib.AbstractContextManager[None]:
        sequence = self._layout.sequence
        return contextlib.nullcontext() if sequence is None else sequence.splitting(whole)

    def _autocast(self) -> torch.autocast:
        enabled = self._dtype != torch.float32 and not self._layout.casts_itself
        return torch.autocast(self.device.type, dtype=self._dtype, enabled=enabled)

    def loss_of(self, micro_batches: Sequence[MicroBatch], *, observe: Observer | None = None) -> tuple[float, int]:
        """Return the summed loss and the number of tokens, without dropout."""
        own, losses = self._own(micro_batches), []
        self.module.eval()
        with torch.no_grad(), self._autocast():
            for whole, batch in zip(micro_batches, own, strict=True):
                with self._split(whole):
                    losses.append(
                        token_loss_sum(
                            self.module,
                            batch,
                            device=self.device,
                            observe=observe,
                            preferences=self.preferences,
                            by_source=self.by_source,
                        )
                    )
        self.module.train()
        return torch.stack(losses).double().sum().item(), num_items(own)

    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Continue greedily; every rank does all of it, by itself where it holds the whole model."""
        self.module.eval()
        with torch.no_grad(), self._autocast():
            ids = generate_greedily(self.module, input_ids.to(self.device), max_new_tokens=max_new_tokens)
        self.module.train()
        return ids

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[WholeModel]:
        """Gather shards, in evaluation mode."""
        casts = self._dtype != torch.float32 and not self._layout.casts_itself
        self.module.eval()
        with self._layout.gathered():
            yield WholeModel(module=self._layout.module, autocast=self._dtype if casts else None)
        self.module.train()

    def state_bytes(self) -> StateBytes:
        """Count weights, gradients and moments, or this rank's shards of them."""
        return torch_state_bytes(self.module, self._update.optimizer, device=self.device)

    def shards(self) -> list[Shard]:
        """Return this rank's parts of weights and moments, and its generators."""
        return shards_of(self.tensors() | rng_tensors(self.device))

    def load_shards(self, source: StoredState) -> None:
        """Fill weights in place, and moments in jobs that train."""
        fill_tensors(self.tensors() if self._trains else self._weights(), source)
        restore_rng(source, device=self.device)

    def scalars(self) -> dict[str, float]:
        """Return the loss scale."""
        return self._update.scale.state()

    def restore_scalars(self, scalars: Mapping[str, float]) -> None:
        """Set the loss scale."""
        self._update.scale.restore(scalars)

    def tensors(self) -> dict[str, Tensor]:
        """Return weights, buffers and moments by name, sharing storage: this rank's shards.

        With an adapter, only what is trained.
        """
        names: dict[nn.Parameter, str] = {parameter: name for name, parameter in self.module.named_parameters()}
        moments = optimizer_tensors(self._update.optimizer, names, state_names=self._state_names)
        return {**self._weights(), **moments}

    def _weights(self) -> dict[str, Tensor]:
        return saved_tensors(self.module, adapter_only=self._adapter_only)

    def close(self) -> None:
        """Leave the process group.

        DDP goes first. Its reducer would otherwise drop the last reference to the group while it holds the GIL, and
        Gloo's thread may need the GIL to end: a deadlock seen with torch 2.13.
        """
        self._layout.release()
        gc.collect()
        disconnect()
