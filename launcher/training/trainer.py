"""The training loop: data, step, record, evaluate, save; then a sample and the loss curve."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from launcher.checkpoint.manifest import TrainingProgress
from launcher.checkpoint.store import CheckpointStore
from launcher.config.data.padding import PADDING_STEPS
from launcher.config.precision import Fp16Precision
from launcher.data.dataloader import Loader
from launcher.data.dataset import Splits, open_run_splits
from launcher.engines.base import Engine, StepResult, make_engine
from launcher.engines.preemption import Preemption
from launcher.errors import EXIT_PREEMPTED
from launcher.profiling.performance import StepClock
from launcher.protocol.heartbeat import PREEMPTED
from launcher.protocol.loss_curve import draw_curve
from launcher.protocol.results import NUM_STEPS, STOPPED_EARLY
from launcher.training.bad_steps import BadSteps, fatal
from launcher.training.callbacks import Callbacks
from launcher.training.checkpointing import reload_checkpoint, resolve_tokenizer, restore_checkpoint
from launcher.training.early_check import CheckpointCheck
from launcher.training.early_stopping import EarlyStopping
from launcher.training.epochs import with_epoch_steps
from launcher.training.eval_texts import EvalTexts, set_metrics
from launcher.training.evaluation import EvaluationResult, evaluate
from launcher.training.evaluation_metrics import load_metrics
from launcher.training.kept_zeros import report_kept_zeros
from launcher.training.recorder import Recorder
from launcher.training.reference import load_references, with_objective
from launcher.training.saving import CheckpointSaver
from launcher.training.source_metrics import SourceMetrics
from launcher.training.task_evaluation import TaskEvaluation
from launcher.utils.files import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.checkpoint.manifest import CheckpointManifest
    from launcher.config.job.train import Train
    from launcher.engines.context import Context


def train(job: Train, context: Context) -> None:
    """Train on this rank to the last step, from the newest checkpoint if the run has one.

    Raises:
        SystemExit: with code 75, when the run was preempted before that.
    """
    import torch

    clock = StepClock(context.heartbeat, cuda=torch.cuda.is_available(), profiler=context.profiler)
    with CheckpointCheck(context) as check:
        with clock.phase("load"):
            splits = open_run_splits(
                context.run,
                resolve_tokenizer(context, context.run.data),
                heartbeat=lambda: context.heartbeat.update("load"),
            )
        job, context = with_objective(job, context, splits)
        job, context = with_epoch_steps(job, context, num_sequences=splits.train.num_sequences)
        with make_engine(context, clock) as engine:
            Trainer(job, context, splits, engine, clock, context.preemption).run(check)


class Trainer:
    """One rank's part in one training run."""

    def __init__(
        self, job: Train, context: Context, splits: Splits, engine: Engine, clock: StepClock, preemption: Preemption
    ) -> None:
        self.job, self.context, self.splits, self.engine, self.clock = job, context, splits, engine, clock
        self.preemption = preemption
        self.loader = Loader(splits, context.batch, seed=job.seed, rank=context.data_rank)
        self.store = CheckpointStore(context.run_dir.checkpoints, context.run.checkpoint)
        self.saver = CheckpointSaver(self.store, context, engine, tokenizer=splits.tokenizer)
        self.callbacks = Callbacks(job.callbacks, context, engine)
        self.metrics = load_metrics(job.metrics)
        self.texts = EvalTexts(job.eval_sets, context, splits, stride=job.sequence_length, most=job.eval_sequences)
        self.tasks = TaskEvaluation(job, context, splits.tokenizer)
        self.sources = SourceMetrics(splits, engine)
        self.sources.check_measured(context.run.checkpoint.best_metric, num_sequences=job.eval_sequences)
        self.bad_steps = BadSteps(job, drops_steps=isinstance(context.run.precision, Fp16Precision))
        self.early_stopping = EarlyStopping(job, best_metric=context.run.checkpoint.best_metric)
        self.skipped_sequences = 0
        self.recorder: Recorder

    def run(self, check: CheckpointCheck | None = None) -> None:
        """Train, then leave a sample, a curve and the last evaluation.

        Args:
            check: of the checkpoint to continue from, begun before the model was built.
        """
        tokenizer = self.splits.tokenizer
        restored = restore_checkpoint(
            self.store, self.context, self.engine, self.callbacks, tokenizer=tokenizer, check=check
        )
        if self.context.run.sparsity.keep:
            text = report_kept_zeros(self.engine)
            if self.context.is_main:
                print(text, flush=True)
        if self.engine.preferences is not None:
            with self.clock.phase("load"):
                self._use_references(restored)
        first = self.continue_from(restored)
        tokens = restored.tokens if restored else 0
        with Recorder(self.job, self.context, self.engine, start_step=first, tokens=tokens) as self.recorder:
            if self.splits.summary:
                self.recorder.print(f"data: {self.splits.summary}{self._padding_text(first)}")
            unit = "pair" if self.splits.is_paired else "token"
            self.recorder.baselines(first, self.splits.baselines, unit=unit)
            if self.job.epochs is not None:
                self.recorder.write(first, {NUM_STEPS: float(self.job.steps)})
            self.preemption.defer()
            try:
                self.callbacks.on_start(first)
                with self.saver:
                    if self._saves_after(self.job.steps) or self.context.run.checkpoint.every:
                        self.saver.check_shared(first)
                    if self.job.on_bad_step == "rewind" and not (restored and self.context.run.checkpoint.is_own):
                        self.save(first, None, now=True)  # the run may have to return to where it began
                    step = first
                    while step < self.job.steps and not self.early_stopping.is_over:
                        with self.context.profiler.step():
                            step = self.advance(step)
                self._report_saved()
                if self.early_stopping.is_over:
                    self.recorder.write(step, {STOPPED_EARLY: float(step)})
                    self.recorder.print(f"stopped early after step {step}: {self.early_stopping}")
                write_sample_and_curve(self)
                self.end(step)
            except Exception as error:
                self.callbacks.on_exception(error)
                raise
        self.context.heartbeat.update("done", step, steps=step)

    def _use_references(self, restored: CheckpointManifest | None) -> None:
        known = load_references(self.loader, self.splits, self.context, self.engine, restored=restored)
        self.loader.use_references(train=known.train, held_out=known.held_out)

    def _padding_text(self, first: int) -> str:
        """Return the share of padding in the first batches, where their longest rows decide it."""
        steps = range(first, min(self.job.steps, first + PADDING_STEPS))
        if not self.context.is_main or self.splits.train.row_length is not None or not steps:
            return ""
        return f", {sum(map(self.loader.padding, steps)) / len(steps):.1%} padding"

    def continue_from(self, manifest: CheckpointManifest | None) -> int:
        """Draw the data from where a loaded checkpoint stands; return the steps already done."""
        if manifest is None:
            return 0
        if manifest.data is not None:
            self.loader.continue_at(manifest.step, sequences=manifest.data.sequences)
            self.skipped_sequences = manifest.data.skipped
        self.bad_steps.restore(manifest.recent_losses)
        self.early_stopping.restore(manifest)
        return manifest.step

    def advance(self, step: int) -> int:
        """Take optimizer step ``step`` (0-based), then evaluate and save where it is time to.

        Returns:
            The step to take next.
        """
        done = step + 1
        self.saver.check()
        result, why = self.train_step(step)
        if why is not None:
            if self.job.on_bad_step == "rewind":
                return self.rewind(step, why)
            self.bad_steps.count_skip(done, why)
            self.recorder.print(f"step {done} is skipped: {why}")
        if result.preempted and done < self.job.steps:
            self.exit_preempted(done)
        held_out = self.evaluate(done) if self._evaluates_after(done) else None
        if held_out and not held_out.preempted:
            self.generate_samples(done)
        if held_out and held_out.preempted and done < self.job.steps:
            self.exit_preempted(done, held_out)
        if self._saves_after(done):
            self.save(done, held_out)
        return done

    def train_step(self, step: int) -> tuple[StepResult, str | None]:
        """Take optimizer step ``step`` (0-based) and record it; return also what is bad about it.

        Raises:
            JobError: it is bad, and ``job.on_bad_step=stop``.
        """
        started, self.clock.step = time.perf_counter(), step
        with self.clock.phase("data"):
            micro_batches = self.loader.step(step)
        self.callbacks.before_step(step + 1)
        rate = self.context.run.optimizer.lr * self.context.run.schedule.factor(step, self.job.steps)
        limit = self.bad_steps.limit if self.job.on_bad_step == "skip" else None
        result = self.engine.step(micro_batches, lr=rate, max_loss=limit, preempted=self.preemption.requested)
        of_sources = {f"train/{name}/loss": loss for name, loss in self.sources.train().items()}
        if (why := self.bad_steps.judge(result)) is not None and self.job.on_bad_step == "stop":
            raise fatal(step + 1, why)
        pairs = None if self.engine.preferences is None else self.engine.preferences.take_metrics()
        if pairs is not None:
            result = replace(result, tokens=round(result.tokens * pairs.labels_per_pair))
        self.recorder.step(
            step + 1,
            result,
            lr=rate,
            elapsed_s=time.perf_counter() - started,
            parts=self.clock.pop_times(),
            padding=self.loader.padding(step) if self.splits.summary and self.context.is_main else None,
        )
        self.recorder.callbacks(step + 1, of_sources if pairs is None else {**pairs.rewards, **of_sources})
        self.recorder.callbacks(step + 1, self.callbacks.on_step(step + 1, result))
        return result, why

    def rewind(self, step: int, why: str) -> int:
        """Load the newest checkpoint, skip the batches from there to ``step``, and save that.

        Returns:
            The step to take next.

        Raises:
            JobError: it has happened too often.
        """
        with self.clock.phase("checkpoint"):
            self.saver.wait()
            self._report_saved()
            drawn = self.loader.drawn(step + 1)
            manifest = reload_checkpoint(self.store, self.context, self.engine, self.callbacks)
            first = self.continue_from(manifest)
            self.bad_steps.count_rewind(step + 1, why, to=first)
            num_skipped = drawn - self.loader.drawn(first)
            self.skipped_sequences += num_skipped
            self.loader.continue_at(first, sequences=drawn)
            self.recorder.begin(first, tokens=manifest.tokens)
            self.recorder.write(first, {"train/skipped_sequences": float(self.skipped_sequences)})
            self.recorder.print(f"step {step + 1}: {why}; back to step {first}, {num_skipped} sequences are skipped")
            progress = replace(self.progress(first), eval_loss=manifest.eval_loss, eval_metrics=manifest.eval_metrics)
            self.saver.save(progress, now=True, beside=self._save_callbacks)
            self.saver.take_completed()
        return first

    def evaluate(self, done: int) -> EvaluationResult:
        """Measure the held-out loss after ``done`` steps, and record it."""
        with self.clock.phase("evaluate"):
            asked = self.preemption.requested
            held_out = evaluate(
                self.engine, self.loader.held_out(self.job.eval_sequences), preempted=asked, metrics=self.metrics
            )
            of_sources = {f"{name}/loss": loss for name, loss in self.sources.held_out().items()}
            held_out = replace(held_out, metrics={**held_out.metrics, **of_sources})
            if self.engine.preferences is not None:
                rewards = self.engine.preferences.take_metrics().rewards
                held_out = replace(held_out, metrics={**held_out.metrics, **rewards})
            if not held_out.preempted:
                of_sets = self.texts.evaluate(self.engine, self.loader, preempted=asked)
                asked_since = any(each.preempted for each in of_sets.values())
                metrics = {**held_out.metrics, **set_metrics(of_sets)}
                held_out = replace(held_out, preempted=asked_since, metrics=metrics)
            if not held_out.preempted:
                answered = self.tasks.evaluate(self.engine, preempted=asked)
                metrics = {**held_out.metrics, **(answered or {})}
                held_out = replace(held_out, preempted=answered is None, metrics=metrics)
        self.recorder.evaluation(done, held_out.loss, metrics=held_out.metrics, parts=self.clock.pop_times())
        self.early_stopping.observe(held_out)
        self.recorder.callbacks(done, self.callbacks.on_evaluate(done, held_out.loss))
        return held_out

    def generate_samples(self, done: int) -> None:
        """Continue each of ``job.sample_prompts``, on every rank; rank 0 records the texts."""
        texts = []
        for prompt in self.job.sample_prompts:
            with self.clock.phase("sample"):
                texts.append(generate_sample(prompt, self.job, self.splits, self.engine))
        self.recorder.samples(done, list(zip(self.job.sample_prompts, texts, strict=True)))

    def save(self, done: int, held_out: EvaluationResult | None, *, now: bool = False) -> None:
        """Save the state after ``done`` steps, every rank its part."""
        progress = self.progress(done)
        if held_out is not None:
            progress = replace(progress, eval_loss=held_out.loss, eval_metrics=held_out.metrics)
        with self.clock.phase("checkpoint"):
            now = now or self._is_last(done)  # no step is left to write beside
            self.saver.save(progress, now=now, beside=self._save_callbacks)
        self._report_saved()

    def progress(self, done: int) -> TrainingProgress:
        """Return where the run stands after ``done`` steps."""
        return TrainingProgress(
            step=done,
            sequences=self.loader.drawn(done),
            skipped=self.skipped_sequences,
            recent_losses=self.bad_steps.losses,
            best_value=self.early_stopping.best,
            stale_evaluations=self.early_stopping.num_stale,
        )

    def _save_callbacks(self, folder: Path) -> None:
        self.callbacks.save(folder, is_main=self.context.is_main)

    def _report_saved(self) -> None:
        """Tell callbacks of checkpoints that have become complete."""
        for step in self.saver.take_completed():
            self.recorder.callbacks(step, self.callbacks.on_save(step, self.store.folder_of(step)))

    def exit_preempted(self, done: int, held_out: EvaluationResult | None = None) -> NoReturn:
        """Save, whatever the policy is, and exit with the resume code, on all ranks."""
        self.save(done, held_out, now=True)
        if self.context.is_main:  # even if this process is killed while it exits, the run can be resumed
            self.context.heartbeat.update("checkpoint", None, **{PREEMPTED: 1.0})
        if held_out is None and self._evaluates_after(done):  # once saved: the time left may be too short for it
            self.evaluate(done)
        self.end(done)
        raise SystemExit(EXIT_PREEMPTED)

    def end(self, done: int) -> None:
        """Let the callbacks end, after ``done`` steps."""
        self.recorder.callbacks(done, self.callbacks.on_end(done))

    def _evaluates_after(self, done: int) -> bool:
        every = self.job.eval_every
        return done == self.job.steps or bool(every and done % every == 0)

    def _saves_after(self, done: int) -> bool:
        policy = self.context.run.checkpoint
        return bool(policy.every and done % policy.every == 0) or (policy.at_end and self._is_last(done))

    def _is_last(self, done: int) -> bool:
        """Return whether no step follows."""
        return done == self.job.steps or self.early_stopping.is_over


def write_sample_and_curve(trainer: Trainer) -> None:
    """Generate on every rank; on rank 0 write sample.txt and loss.png."""
    job, context, splits, clock = trainer.job, trainer.context, trainer.splits, trainer.clock
    if job.sample_tokens and splits.tokenizer is not None:
        with clock.phase("sample"):
            text = generate_sample(job.sample_prompt, job, splits, trainer.engine)
        if context.is_main:
            write_atomic(context.run_dir.sample, text + "\n")
            print(f"sample: {text!r}", flush=True)
    if context.is_main:
        with clock.phase("curve"):
            draw_curve(context.run_dir.metrics, context.run_dir.curve, baselines=splits.baselines)
        print(f"loss curve: {context.run_dir.curve}", flush=True)


def generate_sample(prompt: str, job: Train, splits: Splits, engine: Engine) -> str:
    """Return a prompt and its greedy continuation; every rank must call it."""
    import torch

    assert splits.tokenizer is not None, "no tokenizer, no text"
    ids = splits.tokenizer.encode(prompt) or [0]
    room = max(1, splits.max_length - job.sample_tokens)
    answer = engine.generate(
        torch.tensor([ids[-room:]], device=engine.device), max_new_tokens=min(job.sample_tokens, splits.max_length - 1)
    )
    return str(splits.tokenizer.decode(answer[0].tolist()))
