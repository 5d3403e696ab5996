"""torch alone: one process, or the whole model on every rank under DistributedDataParallel."""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from launcher.engines.base import Engine, StepResult, nobody_asks
from launcher.engines.distributed import (
    TokenCount,
    choose_device,
    connect,
    disconnect,
    num_labels,
    ranks_with_nonfinite,
)
from launcher.engines.generate import greedy
from launcher.engines.groups import decay_groups
from launcher.engines.loss import token_loss_sum
from launcher.engines.loss_scale import LossScale
from launcher.engines.model import model_of
from launcher.engines.rng import load_rng, save_rng
from launcher.errors import JobError
from launcher.parallel.replicated import Ddp

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.data.loader import MicroBatch
    from launcher.training.clock import Clock

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine(Engine):
    """Master weights, gradients and moments in fp32 on every rank; autocast computes in the run's precision."""

    def __init__(self, context: Context, clock: Clock) -> None:
        run = context.run
        self._clock, self._rank, self._clip_norm = clock, context.rank, run.job.clip_norm
        self.device = choose_device(context.local_rank)
        connect(context, self.device)
        self.module = model_of(context, device=self.device).to(self.device)
        self._forward = self.module
        if isinstance(run.parallel, Ddp) and context.world_size > 1:
            self._forward = _replicated(self.module, bucket_mb=run.parallel.bucket_mb)
        self._replicas = context.world_size
        self._scale = LossScale(run.precision)
        self._dtype = _DTYPES[run.precision.compute]
        self._parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            decay_groups(self.module, weight_decay=run.optimizer.weight_decay),
            lr=run.optimizer.lr,
            betas=run.optimizer.betas,
            eps=run.optimizer.eps,
            fused=True,
        )

    def step(
        self, micro_batches: Sequence[MicroBatch], *, lr: float, preempted: Callable[[], bool] = nobody_asks
    ) -> StepResult:
        """Accumulate gradients of the summed loss, weighed by the tokens of the global batch, then update."""
        count = TokenCount(micro_batches, device=self.device)
        own_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        last = len(micro_batches) - 1
        for number, micro_batch in enumerate(micro_batches):
            # DDP sets up its reduction in the forward pass, so that must be inside no_sync too
            with self._no_sync() if number < last else contextlib.nullcontext():
                with self._clock.phase("forward"), self._autocast():
                    loss = token_loss_sum(self._forward, micro_batch, device=self.device)
                with self._clock.phase("backward"):
                    own_sum += loss.detach()
                    # DDP divides by the number of replicas
                    (loss * (self._replicas * self._scale.value / count.total())).backward()
        with self._clock.phase("optimizer"):
            return self._update(own_sum, count.total(), lr=lr, preempted=preempted())

    def _update(self, own_sum: Tensor, tokens: Tensor, *, lr: float, preempted: bool) -> StepResult:
        """Clip and apply the gradient unless it is not finite; fetch all numbers in one go."""
        sums = torch.stack([own_sum, torch.full_like(own_sum, float(preempted))])
        if dist.is_initialized():
            dist.all_reduce(sums)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        total, num_preempted, scaled_norm, num_tokens = torch.stack([*sums, norm.double(), tokens.double()]).tolist()
        grad_norm, overflow = scaled_norm / self._scale.value, not math.isfinite(scaled_norm)
        if not overflow:
            factor = min(1.0, self._clip_norm / (grad_norm + 1e-6)) if self._clip_norm else 1.0
            self._multiply_gradients(factor / self._scale.value)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._scale.update(overflow=overflow)
        loss = total / num_tokens if num_tokens else math.nan
        return StepResult(
            loss=loss,
            grad_norm=None if overflow else grad_norm,
            tokens=int(num_tokens),
            skipped=overflow,
            nonfinite_ranks=() if math.isfinite(loss) else ranks_with_nonfinite(own_sum.item(), device=self.device),
            preempted=num_preempted > 0,
        )

    def _multiply_gradients(self, factor: float) -> None:
        if factor != 1.0:
            torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], factor)

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._forward, DistributedDataParallel):
            return cast("contextlib.AbstractContextManager[None]", self._forward.no_sync())
        return contextlib.nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)

    def loss_of(self, micro_batch: MicroBatch) -> tuple[float, int]:
        """Return the summed loss and the number of tokens, without dropout."""
        self.module.eval()
        with torch.no_grad(), self._autocast():
            loss = token_loss_sum(self.module, micro_batch, device=self.device)
        self.module.train()
        return loss.item(), num_labels([micro_batch])

    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Continue greedily; every rank does all of it by itself."""
        self.module.eval()
        with torch.no_grad(), self._autocast():
            ids = greedy(self.module, input_ids.to(self.device), max_new_tokens=max_new_tokens)
        self.module.train()
        return ids

    def save(self, folder: Path) -> None:
        """Write weights (``model/``, which ``model.weights`` takes too) and optimiser once, generators rank by rank."""
        if self._rank == 0:
            self.module.save_pretrained(folder / "model")
            state = {"optimizer": self._optimizer.state_dict(), "loss_scale": self._scale.state()}
            torch.save(state, folder / "optimizer.pt")
        save_rng(folder, rank=self._rank, device=self.device)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote; every rank reads all of it.

        Raises:
            JobError: the folder does not hold this model.
        """
        from safetensors.torch import load_model

        try:
            load_model(self.module, folder / "model" / "model.safetensors", device=str(self.device))
        except (OSError, RuntimeError) as error:
            raise JobError(f"{folder} does not hold this model: {error}") from error
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location=self.device)
        self._optimizer.load_state_dict(state["optimizer"])
        self._scale.restore(state["loss_scale"])
        load_rng(folder, rank=self._rank, device=self.device)

    def close(self) -> None:
        """Leave the process group.

        DDP goes first. Its reducer would otherwise drop the last reference to the group while it holds the GIL, and
        Gloo's thread may need the GIL to end: a deadlock seen with torch 2.13.
        """
        self._forward = self.module
        gc.collect()
        disconnect()


def _replicated(module: nn.Module, *, bucket_mb: int) -> DistributedDataParallel:
    """Return ``module`` with its gradients averaged over ranks; buffers are constants and need no synchronising."""
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # renamed in 2.13
    return DistributedDataParallel(module, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True, **{buffers: False})
