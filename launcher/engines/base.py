"""The engine interface (step, loss, generate, save, load), and which engine runs a strategy."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from launcher.config.adapter_folder import ADAPTER_ATTRIBUTE
from launcher.errors import EXIT_BAD_INPUT, JobError
from launcher.utils.progress import OnProgress, no_progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from launcher.checkpoint.tensors import Shard, StoredState
    from launcher.data.dataloader import MicroBatch
    from launcher.engines.context import Context
    from launcher.engines.preferences import DpoLoss
    from launcher.engines.source_losses import SourceLosses
    from launcher.profiling.performance import StepClock
    from launcher.protocol.plan import StateBytes


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    loss: float
    """Mean over all tokens or pairs of the global batch, before the update, in nats."""
    grad_norm: float | None
    """Global L2 norm of the gradient before clipping; ``None`` where the step was skipped."""
    tokens: int
    """Tokens with a label in the global batch; of preferences, pairs."""
    skipped: bool = False
    """The gradient was not finite, or the loss above the limit: the weights are unchanged.
    In fp16 the loss scale drops where the gradient was not finite."""
    nonfinite_ranks: tuple[int, ...] = ()
    """Ranks whose own loss was not finite."""
    preempted: bool = False
    """Some rank had been asked to leave by the end of the step."""


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """A model that a rank can use by itself, without the other ranks."""

    module: PreTrainedModel
    """In evaluation mode."""
    autocast: torch.dtype | None
    """Format of its matrix products; ``None`` for that of its weights."""


Observer = Callable[["Tensor", "Tensor"], None]
"""Takes logits (sequences, tokens, vocabulary) and labels (sequences, tokens)."""


def never_preempted() -> bool:
    """Return False: no rank has been asked to leave."""
    return False


class Engine(ABC):
    """A model with its optimizer, spread over ranks; all ranks call every method together."""

    device: torch.device
    """Where this rank computes."""

    module: nn.Module
    """The model; under ZeRO-3 its parameters are empty outside of a forward pass."""

    preferences: DpoLoss | None = None
    """The loss of pairs, where these are what a job trains on."""

    by_source: SourceLosses | None = None
    """The loss of each source of a mixture, added up by steps and by :meth:`loss_of`."""

    @abstractmethod
    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        lr: float,
        max_loss: float | None = None,
        preempted: Callable[[], bool] = never_preempted,
    ) -> StepResult:
        """Take one optimizer step.

        Args:
            micro_batches: this rank's share of the global batch.
            lr: learning rate.
            max_loss: leave weights and moments as they are unless the loss is below this and the gradient finite;
                ``None`` for no limit.
            preempted: whether this rank has been asked to exit; read late in the step, and sent to all ranks with the
                loss.
        """

    @abstractmethod
    def loss_of(self, micro_batches: Sequence[MicroBatch], *, observe: Observer | None = None) -> tuple[float, int]:
        """Return the loss summed over this rank's tokens or pairs, and their number.

        Summed over all ranks, both may count a token several times, but equally often.

        Args:
            micro_batches: of this rank.
            observe: gets the logits and labels of each; pipelines have none to give.
        """

    @abstractmethod
    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Return ``input_ids`` (sequences, tokens) with a greedy continuation, on every rank."""

    def add_losses_to(self, by_source: SourceLosses) -> None:
        """Add up the loss of each source of a mixture from now on."""
        self.by_source = by_source

    def whole_model(self) -> AbstractContextManager[WholeModel]:
        """Return a context in which every rank holds the whole model.

        Shards are gathered for it. Strategies that split layers or blocks over ranks have none.
        """
        raise AssertionError(f"no rank of a {type(self).__name__} can hold the whole model: refused in the plan")

    @property
    def model_config(self) -> PreTrainedConfig:
        """Configuration of the whole model, whatever part of it this rank has."""
        config: PreTrainedConfig = self.module.config
        return config

    @property
    def adapter_config(self) -> Mapping[str, Any] | None:
        """PEFT's config of the adapter that is trained; ``None`` if all weights are."""
        found: Mapping[str, Any] | None = getattr(self.module, ADAPTER_ATTRIBUTE, None)
        return found

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and whole fp32 value on the CPU, one at a time.

        Tied parameters come once.

        Stages of a pipeline yield their own, under the names that the whole model has.
        """
        from launcher.engines.model_state import whole_parameters

        return whole_parameters(self.module, device=self.device)

    def linear_matrices(self) -> dict[str, nn.Parameter]:
        """Return the matrices of linear layers in blocks that this rank has a part of, by name."""
        from launcher.engines.kept_zeros import linear_matrices

        return linear_matrices([self.module])

    @abstractmethod
    def state_bytes(self) -> StateBytes:
        """Return the bytes of model state that this rank holds now, by part.

        Gradients are there between the backward pass and the update: when the phase ``optimizer`` begins.
        """

    @abstractmethod
    def shards(self) -> list[Shard]:
        """Return this rank's parts of weights, optimizer state and generators, sharing storage.

        Their names, shapes and formats are those of the whole model in fp32, whatever the strategy.
        """

    @abstractmethod
    def load_shards(self, source: StoredState) -> None:
        """Take this rank's parts out of a checkpoint of any strategy and number of ranks.

        Raises:
            ValueError: it does not hold this model and optimizer.
        """

    @abstractmethod
    def scalars(self) -> dict[str, float]:
        """Return what else an identical next step needs, the same on every rank: the loss scale."""

    @abstractmethod
    def restore_scalars(self, scalars: Mapping[str, float]) -> None:
        """Continue from what :meth:`scalars` returned."""

    def save(self, folder: Path) -> None:
        """Write all that ``load`` needs for an identical next step, into an existing folder."""
        from launcher.engines.checkpoint_io import write_state

        write_state(folder, self.shards(), self.scalars())

    def load(self, folder: Path, *, on_progress: OnProgress = no_progress) -> None:
        """Continue from what ``save`` wrote.

        Args:
            folder: of the checkpoint.
            on_progress: called with the bytes that this rank has read, and those that it will have read.

        Raises:
            JobError: the folder does not hold this model and optimizer.
        """
        from launcher.engines.checkpoint_io import read_state

        try:
            source, scalars = read_state(folder)
            source.on_progress = on_progress
            self.load_shards(source)
            self.restore_scalars(scalars)
        except (OSError, ValueError, KeyError) as error:
            why = f"{folder} does not hold this model and optimizer: {error}"
            raise JobError(why, exit_code=EXIT_BAD_INPUT) from error

    @abstractmethod
    def close(self) -> None:
        """Release processes, files and memory; the engine cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


ENGINES: dict[str, str] = {
    "single": "launcher.engines.torch:TorchEngine",
    "ddp": "launcher.engines.torch:TorchEngine",
    "fsdp": "launcher.engines.torch:TorchEngine",
    "zero": "launcher.engines.deepspeed.zero:DeepSpeedEngine",
    "pipeline": "launcher.engines.pipeline.engine:PipelineEngine",
    "deepspeed_pipeline": "launcher.engines.deepspeed.pipeline:DeepSpeedPipelineEngine",
}
"""The engine of each kind of strategy."""


def make_engine(context: Context, clock: StepClock) -> Engine:
    """Connect the ranks, build the model and return the engine that the run's strategy asks for."""
    module, _, name = ENGINES[context.run.parallel.kind].partition(":")
    engine: Engine = getattr(importlib.import_module(module), name)(context, clock)
    return engine
