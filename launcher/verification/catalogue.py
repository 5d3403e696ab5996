"""What the job ``verify`` can compare with one process: a strategy is one line here."""

from __future__ import annotations

from typing import Final

from launcher.activation import Offload, Recompute, RecomputeEvery
from launcher.parallel.deepspeed_pipeline import DeepSpeedPipeline
from launcher.parallel.fsdp import Fsdp
from launcher.parallel.pipeline import Pipeline
from launcher.parallel.replicated import Ddp
from launcher.parallel.zero import Zero
from launcher.verification.case import Case

ZERO3: Final = Zero(stage=3, persistence_threshold=0)  # models are small here: partition all of it
FULL: Final = Recompute()
EVERY_2: Final = RecomputeEvery(k=2)

CATALOGUE: Final[dict[str, Case]] = {
    # the whole model on every rank
    "ddp": Case(Ddp()),
    "ddp_micro1": Case(Ddp(), micro_batch=1),
    "ddp_recomputed": Case(Ddp(), activation=FULL),
    "ddp_every_2": Case(Ddp(), activation=EVERY_2),
    "ddp_activations_offloaded": Case(Ddp(), activation=Offload()),
    # shards of FSDP2
    "fsdp": Case(Fsdp()),
    "fsdp_micro1": Case(Fsdp(), micro_batch=1),
    "fsdp_recomputed": Case(Fsdp(), activation=FULL),
    "fsdp_every_2": Case(Fsdp(), activation=EVERY_2),
    "fsdp_kept": Case(Fsdp(reshard_after_forward=False)),
    "fsdp_offload": Case(Fsdp(offload="cpu")),
    "hsdp": Case(Fsdp(replicate=2), ranks=4),
    # shards of DeepSpeed
    "zero0": Case(Zero(stage=0)),
    "zero1": Case(Zero(stage=1)),
    "zero2": Case(Zero(stage=2)),
    "zero3": Case(ZERO3),
    "zero3_micro1": Case(ZERO3, micro_batch=1),
    "zero3_recomputed": Case(ZERO3, activation=FULL),
    "zero3_every_2": Case(ZERO3, activation=EVERY_2),
    "zero3_offload": Case(
        Zero(stage=3, persistence_threshold=0, offload_optimizer="cpu", offload_parameters="cpu", pin_memory=False)
    ),
    # slices of matrices and of sequences
    "tensor": Case(Fsdp(tensor=2), ranks=2),
    "tensor_recomputed": Case(Fsdp(tensor=2), activation=FULL, ranks=2),
    "sequence": Case(Fsdp(sequence=2), ranks=2),
    "sequence_recomputed": Case(Fsdp(sequence=2), activation=FULL, ranks=2),
    # stages on ranks of their own; where there are more, pipelines side by side
    "pipeline2_gpipe": Case(Pipeline(stages=2, schedule="gpipe"), ranks=2),
    "pipeline2_1f1b": Case(Pipeline(stages=2, schedule="1f1b"), ranks=2),
    "pipeline2_1f1b_micro1": Case(Pipeline(stages=2, schedule="1f1b"), micro_batch=1, ranks=2),
    "pipeline2_1f1b_recomputed": Case(Pipeline(stages=2, schedule="1f1b"), activation=FULL, ranks=2),
    "pipeline2_1f1b_every_2": Case(Pipeline(stages=2, schedule="1f1b"), activation=EVERY_2, ranks=2),
    "pipeline2_interleaved": Case(Pipeline(stages=2, schedule="interleaved_1f1b"), ranks=2),
    "pipeline2_zero_bubble": Case(Pipeline(stages=2, schedule="interleaved_zero_bubble"), ranks=2),
    "pipeline2_zbv": Case(Pipeline(stages=2, schedule="zbv"), ranks=2),
    "pipeline2_fsdp": Case(Pipeline(stages=2, schedule="1f1b", data="shard"), ranks=4),
    "pipeline4_gpipe": Case(Pipeline(stages=4, schedule="gpipe"), ranks=4),
    "pipeline4_1f1b": Case(Pipeline(stages=4, schedule="1f1b"), ranks=4),
    "pipeline4_interleaved": Case(Pipeline(stages=4, schedule="interleaved_1f1b"), ranks=4),
    "pipeline4_zero_bubble": Case(Pipeline(stages=4, schedule="interleaved_zero_bubble"), ranks=4),
    "pipeline4_zbv": Case(Pipeline(stages=4, schedule="zbv"), ranks=4),
    "deepspeed_pipeline2": Case(DeepSpeedPipeline(stages=2), ranks=2),
    "deepspeed_pipeline4": Case(DeepSpeedPipeline(stages=4), ranks=4),
}
"""Name to strategy, in the order in which they are taken."""
