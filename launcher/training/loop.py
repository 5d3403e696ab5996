"""The training loop: data, step, record, evaluate, save; then a sample and a picture."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from launcher.checkpoint.store import CheckpointStore
from launcher.data.loader import Loader
from launcher.data.open import Splits, open_splits
from launcher.engines import make_engine
from launcher.engines.base import Engine, StepResult
from launcher.errors import JobError
from launcher.training.clock import Clock
from launcher.training.epilogue import finish
from launcher.training.evaluation import held_out_loss
from launcher.training.recorder import Recorder
from launcher.training.resume import restore, save

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.jobs.train import Train


def train(job: Train, context: Context) -> None:
    """Train on this rank, from the newest checkpoint the run may continue from, to ``job.steps``."""
    import torch

    clock = Clock(context.heartbeat, cuda=torch.cuda.is_available())
    with clock.phase("load"):
        splits = open_splits(
            context.run.data,
            context.run.model,
            sequence_length=job.sequence_length,
            seed=job.seed,
            beat=lambda: context.heartbeat.beat("load"),
        )
    with make_engine(context, clock) as engine:
        Trainer(job, context, splits, engine, clock).run()


class Trainer:
    """One rank's part in one training run."""

    def __init__(self, job: Train, context: Context, splits: Splits, engine: Engine, clock: Clock) -> None:
        self.job, self.context, self.splits, self.engine, self.clock = job, context, splits, engine, clock
        self.loader = Loader(splits, context.batch, seed=job.seed, rank=context.rank)
        self.store = CheckpointStore(context.run_dir.checkpoints, context.run.checkpoint)
        self.recorder: Recorder

    def run(self) -> None:
        """Train, then leave a sample, a curve and the last evaluation."""
        first = restore(self.store, self.context, self.engine)
        with Recorder(self.context, self.engine, start_step=first) as self.recorder:
            self.recorder.baselines(first, self.splits.baselines)
            for step in range(first, self.job.steps):
                self.train_step(step)
                done = step + 1
                held_out = self.evaluate(done) if self._evaluates_after(done) else None
                if self._saves_after(done):
                    with self.clock.phase("checkpoint"):
                        save(self.store, self.context, self.engine, step=done, held_out_loss=held_out)
            finish(self)

    def train_step(self, step: int) -> None:
        """Take optimiser step ``step`` (0-based) and record it."""
        started, self.clock.step = time.perf_counter(), step
        with self.clock.phase("data"):
            micro_batches = self.loader.step(step)
        rate = self.context.run.optimizer.lr * self.context.run.schedule.factor(step, self.job.steps)
        result = self.engine.step(micro_batches, lr=rate)
        refuse_nonfinite(result, step)
        self.recorder.step(step + 1, result, lr=rate, elapsed_s=time.perf_counter() - started, parts=self.clock.take())

    def evaluate(self, done: int) -> float:
        """Return the held-out loss after ``done`` steps, and record it."""
        with self.clock.phase("evaluate"):
            loss = held_out_loss(self.engine, self.loader, self.job.eval_sequences)
        self.recorder.evaluation(done, loss, parts=self.clock.take())
        return loss

    def _evaluates_after(self, done: int) -> bool:
        every = self.job.eval_every
        return done == self.job.steps or bool(every and done % every == 0)

    def _saves_after(self, done: int) -> bool:
        policy = self.context.run.checkpoint
        return bool(policy.every and done % policy.every == 0) or (policy.at_end and done == self.job.steps)


def refuse_nonfinite(result: StepResult, step: int) -> None:
    """End the run when the loss is NaN or infinite.

    Raises:
        JobError: on every rank alike, naming the step and the ranks it came from.
    """
    if math.isfinite(result.loss):
        return
    ranks = ", ".join(map(str, result.nonfinite_ranks))
    raise JobError(
        f"loss is {result.loss} at step {step + 1}, first seen on rank {ranks}: "
        "lower optimizer.lr, raise schedule.warmup_steps, or set precision=bf16 where it is fp16"
    )
