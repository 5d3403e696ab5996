"""Errors that a case plants in its own process before the engine is made: a test that cannot see one proves nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def tied_gradients_stay_apart() -> None:
    """Leave each stage with its own gradient of the tied embedding."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    PipelineEngine._exec_reduce_tied_grads = lambda engine: None
    from deepspeed.runtime.pipe import schedule

    PipelineEngine._INSTRUCTION_MAP[schedule.ReduceTiedGrads] = PipelineEngine._exec_reduce_tied_grads


def micro_batches_weigh_the_same() -> None:
    """Average over micro-batches whose labelled tokens differ in number."""
    from launcher.engines.deepspeed.pipeline import StageLoss

    def call(self: Any, logits: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        self.total += loss.detach()
        return loss / (labels != -100).sum()

    StageLoss.__call__ = call


def tied_weight_counts_twice() -> None:
    """Count the gradient of the tied embedding on both stages."""
    from launcher.engines.deepspeed import pipeline_module

    build = pipeline_module._PipelineModule._index_tied_modules

    def index(self: Any) -> Any:
        found = build(self)
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False
        return found

    pipeline_module._PipelineModule._index_tied_modules = index


def tied_gradients_are_not_summed() -> None:
    """Leave each end of a pipeline with its own gradient of the tied embedding."""
    from launcher.engines.pipeline import tied_weights

    tied_weights.TiedWeights.sum_gradients = lambda self: None


def tied_copies_count_twice() -> None:
    """Count the gradient of the tied embedding at both ends of a pipeline."""
    from launcher.engines.pipeline import tied_weights

    tied_weights.TiedWeights.counted_elsewhere = ()


def pipelines_side_by_side_keep_their_gradients() -> None:
    """Leave each pipeline with the gradient of its own samples."""
    from launcher.engines.pipeline import engine as pipeline

    pipeline.sum_gradients = lambda parameters, group: None


def gradients_of_shards_are_not_scaled() -> None:
    """Take the mean over shards that FSDP2 makes for the sum."""
    from launcher.engines.pipeline.schedules import PipelineSchedule

    multiply = PipelineSchedule.train
    PipelineSchedule.train = lambda self, given, *, factor: multiply(self, given, factor=factor / 2)


def micro_batches_are_swapped() -> None:
    """Give stages other micro-batches than the labels are of."""
    from launcher.engines.pipeline.schedules import PipelineSchedule

    ordered = PipelineSchedule._args
    PipelineSchedule._args = lambda self, given: ordered(self, given[::-1])


def replicas_keep_their_gradients() -> None:
    """Do without DistributedDataParallel."""
    from launcher.engines import parallelize

    parallelize._replicated = lambda module, *, bucket_mb: module


def shards_take_the_mean_for_the_sum() -> None:
    """Forget that FSDP2 averages gradients."""
    from launcher.engines import parallelize

    build = parallelize.ShardedModel.__init__

    def init(self: Any, *given: Any) -> None:
        build(self, *given)
        self.averaged_over = 1

    parallelize.ShardedModel.__init__ = init


def segments_begin_at_position_zero() -> None:
    """Have every segment of a sequence begin where the first one does."""
    from launcher.data.dataloader import MicroBatch
    from launcher.engines.ulysses import SequenceParallel

    split = SequenceParallel.share_of

    def share_of(self: Any, whole: MicroBatch) -> MicroBatch:
        own = split(self, whole)
        return MicroBatch(input_ids=own.input_ids, labels=own.labels)

    SequenceParallel.share_of = share_of


def tensor_ranks_do_not_add_up() -> None:
    """Go on with each rank's own part of a product that all tensor ranks should sum."""
    from torch.distributed.tensor.parallel import RowwiseParallel

    RowwiseParallel._prepare_output_fn = staticmethod(lambda layouts, is_local, module, output, mesh: output.to_local())


def ranks_count_their_own_tokens() -> None:
    """Weigh the loss under DeepSpeed by the tokens of one rank."""
    from launcher.engines.deepspeed import zero

    class Own(zero.TokenCount):
        def __init__(self, micro_batches: Any, *, device: Any, copies: int = 1) -> None:
            super().__init__(micro_batches, device=device, copies=copies)
            self._work.wait()
            self._work, self._total = None, torch.tensor(zero.num_items(micro_batches))

    zero.TokenCount = Own


def rows_are_numbered_by_each_rank() -> None:
    """Draw which layers a sequence skips by its row, not by its place in the run."""
    from dataclasses import replace

    from launcher.engines.early_exit import EarlyExitLoss

    kept = EarlyExitLoss._kept
    EarlyExitLoss._kept = lambda self, batch, device: kept(
        self, replace(batch, drawn=torch.arange(len(batch.input_ids))), device
    )


def gradients_of_zeros_count() -> None:
    """Leave the gradients of zeros in the norm, and restore the zeros only after the update."""
    from launcher.engines import kept_zeros

    def remember(self: Any) -> None:
        self._zeros = [matrix.detach() == 0 for matrix in self._matrices]

    kept_zeros.KeptZeros.mask_gradients = remember


def gradients_of_zeros_reach_deepspeed() -> None:
    """Give DeepSpeed the gradients of zeros."""
    from launcher.engines.deepspeed import base

    base.mask_in_backward = lambda matrices: None


def zeros_are_not_restored() -> None:
    """Leave zeros as an update makes them that depends on the whole matrix."""
    from launcher.engines import kept_zeros

    kept_zeros.KeptZeros.restore = lambda self: None
