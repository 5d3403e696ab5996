"""The DeepSpeed engine: ZeRO at every stage, with offload.

``deepspeed.zero.Init`` around the construction of a Transformers model is silently wrong: Transformers initialises
parameters that are already empty. So each part of the model is partitioned once it has its weights.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from launcher.config.parallel.zero import Zero
from launcher.engines.base import Observer, StepResult, WholeModel, never_preempted
from launcher.engines.deepspeed.base import DeepSpeedEngineBase, choose_native_adam, read_parameters_once
from launcher.engines.deepspeed.nvme import SwapFolder
from launcher.engines.distributed import DTYPES, TokenCount, disconnect, num_items, sum_over_ranks
from launcher.engines.early_exit import early_exit_loss
from launcher.engines.generate import generate_greedily
from launcher.engines.loss import loss_function, token_loss_sum
from launcher.engines.model import build_run_model
from launcher.engines.optimizer import parameter_names, set_rates
from launcher.engines.preferences import preference_loss
from launcher.errors import EnvironmentProblem
from launcher.utils.files import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.checkpoint.tensors import StoredState
    from launcher.data.dataloader import MicroBatch
    from launcher.engines.context import Context
    from launcher.engines.deepspeed.masters import MasterState
    from launcher.profiling.performance import StepClock


class DeepSpeedEngine(DeepSpeedEngineBase):
    """A model under ZeRO."""

    def __init__(self, context: Context, clock: StepClock) -> None:
        zero = context.run.parallel
        assert isinstance(zero, Zero), "this engine supports ZeRO only"
        super().__init__(context, clock)
        self._zero = zero
        if zero.offload_parameters == "nvme":
            read_parameters_once()
        self._swap = self._swap_folder()
        config = self._config()
        self._loss = loss_function(context.run.batched_job)
        self.preferences = preference_loss(context.run.batched_job, device=self.device)
        self._gain = context.world_size * context.batch.gradient_accumulation_steps
        dtype = DTYPES[context.run.precision.compute]
        self._partitioning = ZeroPartitioner(config, dtype=dtype) if zero.stage == 3 else None
        model = self._build()
        self._initialize(model, config, names=parameter_names([model]))
        self.module = self._engine.module
        self._exits = early_exit_loss(context.run.batched_job, self.module)
        self._keep_zeros()
        self._check_swap()

    def _swap_folder(self) -> SwapFolder | None:
        if not self._zero.keeps_state_on_nvme:
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
            native_adam=choose_native_adam(self._context, self._zero, device=self.device),
        )
        for place in ("offload_optimizer", "offload_param"):
            if config["zero_optimization"].get(place, {}).get("device") == "nvme":
                assert self._swap is not None, "something is on NVMe"
                config["zero_optimization"][place]["nvme_path"] = str(self._swap.path)
        return config

    def _build(self) -> nn.Module:
        partitioning = self._partitioning
        if partitioning is None:
            return build_run_model(self._context, device=self.device)
        model = build_run_model(
            self._context,
            device=self.device,
            after=partitioning.partition,
            laid_out=lambda model: partitioning.announce(),
        )
        assert_partitioned(model, small=self._zero.persistence_threshold)
        return model

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        lr: float,
        max_loss: float | None = None,
        preempted: Callable[[], bool] = never_preempted,
    ) -> StepResult:
        """Pass DeepSpeed one micro-batch at a time; it updates the weights after the last.

        It leaves them, and the moments, as they are where the gradient is not finite: a loss that is too high gets such
        a gradient.
        """
        count = TokenCount(micro_batches, device=self.device)
        own_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        set_rates(self._engine.optimizer, lr)
        last, scalars, is_high = len(micro_batches) - 1, self.scalars(), False
        for number, micro_batch in enumerate(micro_batches):
            with self._clock.phase("forward"):
                loss = token_loss_sum(
                    self._engine,
                    micro_batch,
                    device=self.device,
                    function=self._loss,
                    preferences=self.preferences,
                    by_source=self.by_source,
                    exits=self._exits,
                )
            with self._clock.phase("backward"):
                own_sum += loss.detach()
                factor = self._gain / count.total()  # DeepSpeed divides by the number of ranks and of micro-batches
                if number == last and max_loss is not None:
                    (total,) = sum_over_ranks([own_sum.item()], device=self.device)
                    is_high = not total < max_loss * int(count.total())  # NaN is not below
                self._engine.backward(loss * (factor * math.nan if is_high else factor))
                self._check_swap()
            if number < last:
                self._engine.step()
        with self._clock.phase("optimizer"):
            norm = self._unwrapped_norm()
            self._engine.step()
            self._check_swap()
            if is_high:
                self.restore_scalars(scalars)  # nothing overflowed
            return self._step_result(own_sum.item(), tokens=int(count.total()), norm=norm, preempted=preempted())

    def _unwrapped_norm(self) -> float | None:
        """Return the gradient norm where DeepSpeed wraps no optimizer, and so computes none."""
        if isinstance(self._engine.optimizer, torch.optim.Optimizer):
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            return float(nn.utils.get_total_norm(gradients))
        return None

    def loss_of(self, micro_batches: Sequence[MicroBatch], *, observe: Observer | None = None) -> tuple[float, int]:
        """Return the summed loss and the number of tokens, without dropout."""
        self._engine.eval()
        with torch.no_grad():
            losses = [
                token_loss_sum(
                    self._engine,
                    micro_batch,
                    device=self.device,
                    observe=observe,
                    preferences=self.preferences,
                    by_source=self.by_source,
                )
                for micro_batch in micro_batches
            ]
        self._engine.train()
        return torch.stack(losses).double().sum().item(), num_items(micro_batches)

    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Continue greedily; under ZeRO-3 every rank takes part in every token."""
        self._engine.eval()
        with torch.no_grad():
            ids = generate_greedily(
                self.module,
                input_ids.to(self.device),
                max_new_tokens=max_new_tokens,
                synced=self._zero.stage == 3 and self._context.world_size > 1,
            )
        self._engine.train()
        return ids

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[WholeModel]:
        """Gather the parameters of ZeRO-3, in evaluation mode and without DeepSpeed's hooks."""
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        self._engine.eval()
        gathered = self._partitioning is not None
        with unwrap_model_for_generation(self._engine) if gathered else contextlib.nullcontext():
            yield WholeModel(module=cast("PreTrainedModel", self.module), autocast=None)
        self._engine.train()

    def load_shards(self, source: StoredState) -> None:
        """Fill master weights and moments in place, on NVMe too."""
        super().load_shards(source)
        self._check_swap()

    def _master_state(self) -> MasterState:
        from launcher.engines.deepspeed.masters import MasterState

        names = {parameter: name for name, parameter in self.module.named_parameters()}
        return MasterState(self._engine.optimizer, names, adapter_only=self._context.run.lora is not None)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield whole parameters; under ZeRO-3 each is gathered in its turn."""
        import deepspeed

        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._partitioning is not None):
                value = parameter.detach().to("cpu", torch.float32, copy=True)
            yield name, value

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks, the swap folder and the process group."""
        self._engine.destroy()
        if self._partitioning is not None:
            self._partitioning.release()
        disconnect()
        if self._swap is not None:
            self._swap.release()


class ZeroPartitioner:
    """Partitions a model's parts by ZeRO-3, and tells Transformers so until :meth:`release`.

    Generation asks.

    Args:
        config: DeepSpeed's, of stage 3.
        dtype: of the partitioned parameters.
    """

    def __init__(self, config: Mapping[str, Any], *, dtype: torch.dtype) -> None:
        assert dist.is_initialized(), "partitions are laid out over the process group"
        self._config, self._dtype = dict(config), dtype
        self._swapper: Any = None  # to NVMe: a new one would empty the folder that the parts before went to
        self._announced: Any = None

    def announce(self) -> None:
        """Tell Transformers that parameters are partitioned, once the model is laid out.

        Before, it would partition the models inside of an image-text model while their classes are built.
        """
        from transformers.integrations import HfDeepSpeedConfig

        self._announced = HfDeepSpeedConfig(dict(self._config))  # Transformers holds it only weakly

    def partition(self, name: str, part: nn.Module) -> None:
        """Keep this rank's share of a part's parameters, unless an earlier part shares them."""
        import deepspeed

        part.to(self._dtype)
        init = deepspeed.zero.Init(module=part, config_dict_or_path=self._config, param_swapper=self._swapper)
        self._swapper = init.param_swapper

    def release(self) -> None:
        """Let Transformers build plain models again in this process."""
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def assert_partitioned(module: nn.Module, *, small: int) -> None:
    """Check that this rank holds just its share of every parameter that is not small."""
    world_size = dist.get_world_size()
    for name, parameter in module.named_parameters():
        numel = getattr(parameter, "ds_numel", None)
        assert numel is not None, f"{name} was built outside of ZeRO-3"
        if numel <= small:
            continue
        own, share = parameter.ds_tensor.ds_numel, -(-numel // world_size)
        assert parameter.numel() == 0, f"{name} is whole on this rank: {numel} elements"
        assert own <= share + world_size, f"{name}: this rank holds {own} of {numel} elements, not 1/{world_size}"
