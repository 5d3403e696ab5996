"""Random tokens as the micro-batches of a step: what they are does not change how long a step takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from launcher.data.loader import MicroBatch

if TYPE_CHECKING:
    from launcher.context import Context


def random_batches(context: Context) -> list[MicroBatch]:
    """Return this rank's micro-batches of a step of the run: ids below the model's vocabulary, drawn with the seed."""
    run, batch = context.run, context.batch
    shape, length = run.model.shape(), run.batched_job.sequence_length
    assert shape is not None, "refused before anything starts"
    generator = torch.Generator().manual_seed(run.job.seed * 1009 + context.data_rank)
    drawn = torch.randint(shape.vocab_size, (batch.accumulation, batch.micro, length + 1), generator=generator)
    return [MicroBatch(input_ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous()) for ids in drawn]
