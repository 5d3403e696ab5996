"""The training loop: data, step, record, evaluate, save; then a sample and a picture."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NoReturn

from launcher.checkpoint.store import CheckpointStore
from launcher.data.loader import Loader
from launcher.data.open import Splits, open_splits
from launcher.engines import make_engine
from launcher.engines.base import Engine, StepResult
from launcher.errors import EXIT_PREEMPTED, JobError
from launcher.training.clock import Clock
from launcher.training.epilogue import finish
from launcher.training.evaluation import HeldOut, evaluate
from launcher.training.preemption import Preemption
from launcher.training.recorder import Recorder
from launcher.training.resume import restore, save

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.jobs.train import Train


def train(job: Train, context: Context, preemption: Preemption) -> None:
    """Train on this rank, from the newest checkpoint the run may continue from, to ``job.steps``.

    Raises:
        SystemExit: with code 75, when the run was preempted before that.
    """
    import torch

    clock = Clock(context.heartbeat, cuda=torch.cuda.is_available(), profiler=context.profiler)
    with clock.phase("load"):
        splits = open_splits(
            context.run.data,
            context.run.model,
            sequence_length=job.sequence_length,
            seed=job.seed,
            beat=lambda: context.heartbeat.beat("load"),
        )
    with make_engine(context, clock) as engine:
        Trainer(job, context, splits, engine, clock, preemption).run()


class Trainer:
    """One rank's part in one training run."""

    def __init__(
        self, job: Train, context: Context, splits: Splits, engine: Engine, clock: Clock, preemption: Preemption
    ) -> None:
        self.job, self.context, self.splits, self.engine, self.clock = job, context, splits, engine, clock
        self.preemption = preemption
        self.loader = Loader(splits, context.batch, seed=job.seed, rank=context.data_rank)
        self.store = CheckpointStore(context.run_dir.checkpoints, context.run.checkpoint)
        self.recorder: Recorder

    def run(self) -> None:
        """Train, then leave a sample, a curve and the last evaluation."""
        first = restore(self.store, self.context, self.engine)
        with Recorder(self.job, self.context, self.engine, start_step=first) as self.recorder:
            self.recorder.baselines(first, self.splits.baselines)
            self.preemption.hold()
            for step in range(first, self.job.steps):
                with self.context.profiler.step():
                    self.advance(step)
            finish(self)
        self.context.heartbeat.beat("done", self.job.steps)

    def advance(self, step: int) -> None:
        """Take optimiser step ``step`` (0-based), then evaluate and save where it is time to."""
        done = step + 1
        if self.train_step(step).preempted and done < self.job.steps:
            self.leave(done)
        held_out = self.evaluate(done) if self._evaluates_after(done) else None
        if held_out and held_out.preempted and done < self.job.steps:
            self.leave(done, held_out)
        if self._saves_after(done):
            self.save(done, held_out)

    def train_step(self, step: int) -> StepResult:
        """Take optimiser step ``step`` (0-based) and record it."""
        started, self.clock.step = time.perf_counter(), step
        with self.clock.phase("data"):
            micro_batches = self.loader.step(step)
        rate = self.context.run.optimizer.lr * self.context.run.schedule.factor(step, self.job.steps)
        result = self.engine.step(micro_batches, lr=rate, preempted=self.preemption.requested)
        refuse_nonfinite(result, step)
        self.recorder.step(step + 1, result, lr=rate, elapsed_s=time.perf_counter() - started, parts=self.clock.take())
        return result

    def evaluate(self, done: int) -> HeldOut:
        """Measure the held-out loss after ``done`` steps, and record it."""
        with self.clock.phase("evaluate"):
            asked = self.preemption.requested
            held_out = evaluate(self.engine, self.loader, self.job.eval_sequences, preempted=asked)
        self.recorder.evaluation(done, held_out.loss, parts=self.clock.take())
        return held_out

    def save(self, done: int, held_out: HeldOut | None) -> None:
        """Write the checkpoint of ``done`` steps, every rank its part."""
        with self.clock.phase("checkpoint"):
            loss = held_out.loss if held_out else None
            tokenizer = self.splits.tokenizer
            save(self.store, self.context, self.engine, step=done, held_out_loss=loss, tokenizer=tokenizer)

    def leave(self, done: int, held_out: HeldOut | None = None) -> NoReturn:
        """Save whatever the policy says, and end this rank, like all others, with the code that means: resume me."""
        self.save(done, held_out)
        if held_out is None and self._evaluates_after(done):  # once saved: the time left may be too short for it
            self.evaluate(done)
        raise SystemExit(EXIT_PREEMPTED)

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
