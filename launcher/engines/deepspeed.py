"""DeepSpeed: ZeRO at every stage, with offload."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from launcher.engines.base import Engine, StepResult, nobody_asks
from launcher.engines.deepspeed_common import load_checkpoint, save_checkpoint, step_result
from launcher.engines.distributed import DTYPES, TokenCount, choose_device, disconnect, num_labels
from launcher.engines.generate import greedy
from launcher.engines.groups import decay_groups
from launcher.engines.held import deepspeed_state
from launcher.engines.loss import token_loss_sum
from launcher.engines.model import model_of
from launcher.engines.native import allow_fp16, connect_deepspeed, prepare_environment, quiet, take_native_adam
from launcher.engines.nvme import SwapFolder
from launcher.engines.partition import Partitioning, assert_partitioned
from launcher.errors import EnvironmentProblem
from launcher.files import sha256_of
from launcher.parallel.zero import Zero

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.data.loader import MicroBatch
    from launcher.parallel.base import StateBytes
    from launcher.training.clock import Clock


class DeepSpeedEngine(Engine):
    """A model under ZeRO."""

    def __init__(self, context: Context, clock: Clock) -> None:
        zero = context.run.parallel
        assert isinstance(zero, Zero), "this engine carries out ZeRO only"
        prepare_environment(context)
        import deepspeed

        quiet()
        self._clock, self._context, self._zero = clock, context, zero
        self.device = choose_device(context.local_rank)
        connect_deepspeed(context, device=self.device)
        allow_fp16(self.device)
        self._swap = self._swap_folder()
        config = self._config()
        self._gain = context.world_size * context.batch.accumulation
        dtype = DTYPES[context.run.precision.compute]
        self._partitioning = Partitioning(config, dtype=dtype) if zero.stage == 3 else None
        model = self._build()
        self._engine, _, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=decay_groups(model, weight_decay=context.run.optimizer.weight_decay),
            config=config,
            dist_init_required=False,
        )
        self.module = self._engine.module
        self._check_swap()

    def _swap_folder(self) -> SwapFolder | None:
        if not self._zero.uses_nvme:
            return None
        assert self._zero.nvme_path, "refused before anything starts"
        run_id = self._context.run_id or sha256_of(os.fsencode(self._context.run_dir.path.absolute()))
        try:
            return SwapFolder(Path(self._zero.nvme_path).expanduser(), run_id=run_id)
        except OSError as error:
            why = f"{error.filename or self._zero.nvme_path}: {error.strerror}"
            raise EnvironmentProblem(f"parallel.nvme_path={self._zero.nvme_path}: {why}") from error

    def _check_swap(self) -> None:
        if self._swap is not None:
            self._swap.check_room()

    def _config(self) -> dict[str, Any]:
        run = self._context.run
        config = self._zero.ds_config(
            batch=self._context.batch,
            clip_norm=run.batched_job.clip_norm,
            optimizer=run.optimizer,
            precision=run.precision,
            native_adam=take_native_adam(self._context, self._zero, device=self.device),
        )
        for place in ("offload_optimizer", "offload_param"):
            if config["zero_optimization"].get(place, {}).get("device") == "nvme":
                assert self._swap is not None, "something is on NVMe"
                config["zero_optimization"][place]["nvme_path"] = str(self._swap.path)
        return config

    def _build(self) -> nn.Module:
        if self._partitioning is None:
            return model_of(self._context, device=self.device)
        model = model_of(self._context, device=self.device, after=self._partitioning.partition)
        assert_partitioned(model, small=self._zero.persistence_threshold)
        return model

    def step(
        self, micro_batches: Sequence[MicroBatch], *, lr: float, preempted: Callable[[], bool] = nobody_asks
    ) -> StepResult:
        """Hand DeepSpeed one micro-batch after the other; it reduces, scales, clips and updates at the last."""
        count = TokenCount(micro_batches, device=self.device)
        own_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        last = len(micro_batches) - 1
        for number, micro_batch in enumerate(micro_batches):
            with self._clock.phase("forward"):
                loss = token_loss_sum(self._engine, micro_batch, device=self.device)
            with self._clock.phase("backward"):
                own_sum += loss.detach()
                # DeepSpeed divides by the number of ranks and of micro-batches
                self._engine.backward(loss * (self._gain / count.total()))
                self._check_swap()
            if number < last:
                self._engine.step()
        with self._clock.phase("optimizer"):
            norm = self._unwrapped_norm()
            self._engine.step()
            self._check_swap()
            return step_result(
                self._engine,
                own_sum.item(),
                tokens=int(count.total()),
                norm=norm,
                preempted=preempted(),
                device=self.device,
            )

    def _unwrapped_norm(self) -> float | None:
        """Return the gradient norm where DeepSpeed wraps no optimiser around it, and so computes none."""
        if isinstance(self._engine.optimizer, torch.optim.Optimizer):
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            return float(nn.utils.get_total_norm(gradients))
        return None

    def loss_of(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Return the summed loss and the number of tokens, without dropout."""
        self._engine.eval()
        with torch.no_grad():
            losses = [token_loss_sum(self._engine, micro_batch, device=self.device) for micro_batch in micro_batches]
        self._engine.train()
        return torch.stack(losses).double().sum().item(), num_labels(micro_batches)

    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Continue greedily; under ZeRO-3 every rank takes part in every token."""
        self._engine.eval()
        with torch.no_grad():
            ids = greedy(
                self.module,
                input_ids.to(self.device),
                max_new_tokens=max_new_tokens,
                synced=self._zero.stage == 3 and self._context.world_size > 1,
            )
        self._engine.train()
        return ids

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole parameters; under ZeRO-3 each is gathered in its turn."""
        import deepspeed

        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._partitioning is not None):
                value = parameter.detach().to("cpu", torch.float32, copy=True)
            yield name, value

    def held(self) -> StateBytes:
        """Count what is in memory, partitions as such; what lies on NVMe is not."""
        return deepspeed_state(self._engine, device=self.device)

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's checkpoint (weights, optimiser partitions, loss scale) and this rank's generators."""
        save_checkpoint(self._engine, folder, context=self._context, device=self.device)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote at the same world size and stage.

        Raises:
            JobError: the folder holds no checkpoint of DeepSpeed.
        """
        load_checkpoint(self._engine, folder, context=self._context, device=self.device)

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks, the swap folder and the process group."""
        self._engine.destroy()
        if self._partitioning is not None:
            self._partitioning.forget()
        disconnect()
        if self._swap is not None:
            self._swap.release()
