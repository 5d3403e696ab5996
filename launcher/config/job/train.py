"""Jobs train and evaluate: next-token training, and the loss of a model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.config.checkpoint import LOWEST_LOSS
from launcher.config.data.auto import AutoData
from launcher.config.data.base import Corpus
from launcher.config.data.shapes import SHAPES, Shape
from launcher.config.job.eval_sets import EvaluatingJob
from launcher.config.job.eval_tasks import TASK_METRICS, TaskAnsweringJob
from launcher.config.profile import ProfileUnit
from launcher.config.run import LearningJob, Run
from launcher.config.supported_models import EXIT_FAMILIES
from launcher.errors import ConfigError
from launcher.plugins.base import CALLBACK, CROSS_ENTROPY, LOSS, METRIC, TRANSFORM
from launcher.plugins.loading import origin_of, validate_callback_metrics, validate_named
from launcher.protocol.plan import Batch
from launcher.utils.text import counted

_PIPELINES = ("pipeline", "deepspeed_pipeline")
"""Strategies under which no rank has the whole model, or logits and labels together."""


DPO_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
"""What is measured of preferences, as TRL names it."""

LOSS_WINDOW, FEWEST_LOSSES = 64, 8
"""Most and fewest losses of good steps whose median a new loss is compared with."""


@dataclass(frozen=True, kw_only=True)
class PluggableJob(EvaluatingJob):
    """A job whose model and evaluations plugins can extend."""

    transforms: tuple[str, ...] = ()
    """Transforms of plugins, applied in this order to the model before it has weights.
    Name the same ones wherever a checkpoint of the transformed model is loaded."""

    metrics: tuple[str, ...] = ()
    """Metrics of plugins over the held-out tokens, recorded as ``eval/<name>``."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject names that no loaded plugin has."""
        yield from super().validate()
        yield from validate_named("job.transforms", TRANSFORM, self.transforms)
        yield from validate_named("job.metrics", METRIC, self.metrics)

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject transforms and metrics where a rank has only some layers of the model."""
        yield from super().validate_run(run, world_size=world_size)
        if run.parallel.kind in _PIPELINES:
            for field, what in (("transforms", "the whole model"), ("metrics", "the logits")):
                if names := getattr(self, field):
                    option = f"job.{field}"
                    why = f"under parallel={run.parallel.kind} no rank has {what}"
                    fix = f"leave {option} out, or set parallel=ddp, fsdp or zero2"
                    yield ConfigError(option, f"[{','.join(names)}]", why=why, fix=fix)

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield the transforms and metrics, with the plugins that add them."""
        yield from super().describe(run, world_size=world_size)
        for group, field in ((TRANSFORM, "transforms"), (METRIC, "metrics")):
            if names := getattr(self, field):
                yield field, ", ".join(f"{name} ({origin_of(group, name)})" for name in names)


@dataclass(frozen=True, kw_only=True)
class Train(LearningJob, PluggableJob, TaskAnsweringJob):
    """Training on text, on answers or on preferences, with evaluation on a held-out split."""

    kind: ClassVar[str] = "train"
    saves: ClassVar[bool] = True
    resumes: ClassVar[bool] = True
    handles_preemption: ClassVar[bool] = True

    steps: int = 300
    """Optimizer steps in the whole run; a resumed run continues up to this number."""

    epochs: float | None = None
    """Passes over the training sequences; they set the steps in place of ``job.steps``.
    The last step may draw a few sequences of one more pass."""

    eval_every: int = 50
    """Optimizer steps between evaluations; 0 evaluates only at the end."""

    eval_sequences: int = 64
    """Held-out sequences in one evaluation, over all ranks."""

    log_every: int = 10
    """Optimizer steps between printed lines; metrics are recorded at every step."""

    peak_tflops: float | None = None
    """Peak TFLOP/s of one rank's device, for perf/mfu; ``null`` looks the GPU up in a table.
    CPUs, and GPUs that are not in the table, have none."""

    sample_prompt: str = "The"
    """Text that the sample at the end of the run continues."""

    sample_prompts: tuple[str, ...] = ()
    """Texts that the model continues at every evaluation, besides ``sample_prompt`` at the end.
    ``samples.jsonl`` and the trackers get the results."""

    sample_tokens: int = 48
    """Length of each sample in tokens; 0 generates none."""

    loss: str = CROSS_ENTROPY
    """Loss to train on: ``cross_entropy``, or one of a plugin.

    Evaluations always measure cross-entropy."""

    early_exit_loss: float = 0.0
    """Weight of the losses after early layers; 0 trains no exits.
    It is LayerSkip's e_scale (arXiv:2404.16710), and teaches the first layers to draft for
    ``job.speculation=early_exit``. What is recorded as the loss of training is then the weighted mean; evaluations
    measure the whole model."""

    early_exit_curriculum: Literal["rotational", "gradual", "all"] = "rotational"
    """Exits of a step: ``rotational`` (one in so many, others each step), ``gradual``, ``all``.
    ``gradual`` is one more from time to time, from the last on, and all from the middle of the run."""

    early_exit_rotation: int = 8
    """Layers between two exits of a step under ``rotational``."""

    layer_dropout: float = 0.0
    """Probability that a sequence skips the last layer in training.
    That of the first is 0, and it grows with depth, as in LayerSkip. The seed and the place of the sequence in the run
    decide, whatever the ranks are. Skipped layers are computed all the same."""

    objective: Literal["auto", "next_token", "sft", "dpo"] = "auto"
    """What is trained; ``auto`` decides by the rows of the data.
    ``next_token``: all tokens of text. ``sft``: the answers of conversations, or of prompts with responses. ``dpo``:
    direct preference optimization (arXiv:2305.18290) on pairs of a preferred and a rejected answer, whose reference is
    the model as it is before the first step, which is the model without its adapter where that is new."""

    dpo_beta: float = 0.1
    """How close ``dpo`` keeps the model to its reference; the larger, the closer."""

    dpo_label_smoothing: float = 0.0
    """Probability that a preference is the wrong way round, for ``dpo`` (arXiv:2403.00409)."""

    callbacks: tuple[str, ...] = ()
    """Callbacks of plugins, called on every rank around steps, evaluations and checkpoints."""

    on_bad_step: Literal["stop", "skip", "rewind"] = "stop"
    """What follows a step whose loss or gradient is not finite, or whose loss spikes.
    ``stop`` ends the run, ``skip`` leaves weights and moments as they are and takes the next batch, ``rewind`` loads
    the newest checkpoint and skips the batches from there to the bad step (PaLM, arXiv:2204.02311, section 5.1)."""

    spike_factor: float | None = None
    """How many times the median loss of the last 64 good steps is a spike, once there are 8.
    ``null`` recognizes none."""

    max_bad_steps: int = 5
    """Steps in a row that ``skip`` skips, and rewinds to one checkpoint; one more ends the run."""

    early_stopping_patience: int | None = None
    """Evaluations in a row without a better ``checkpoint.best_metric`` that complete the run.
    ``null`` never stops early."""

    early_stopping_threshold: float = 0.0
    """How much the metric must change to count as better."""

    @property
    def eval_set_words(self) -> str:
        """As many tokens of each as of the held-out split."""
        return f"the first {self.eval_sequences} sequences"

    @property
    def profile_unit(self) -> ProfileUnit:
        """Its own steps."""
        return "steps"

    def unused_options(self, run: Run) -> Mapping[str, str]:
        """Return options of what never happens: samples that are not taken, and limits without use."""
        why = "job.sample_tokens=0 generates no sample"
        unused = dict(super().unused_options(run))
        unused |= {} if self.sample_tokens else {"sample_prompt": why, "sample_prompts": why}
        if self.epochs is not None:
            unused["steps"] = f"job.epochs={self.epochs:g} sets the number of steps"
        if self.objective in ("next_token", "sft"):
            why = f"job.objective={self.objective} trains on no preferences"
            unused |= {"dpo_beta": why, "dpo_label_smoothing": why}
        if not self.early_exit_loss:
            why = "job.early_exit_loss=0 trains no exits"
            unused |= {"early_exit_curriculum": why, "early_exit_rotation": why}
        elif self.early_exit_curriculum != "rotational":
            unused["early_exit_rotation"] = f"job.early_exit_curriculum={self.early_exit_curriculum} rotates nothing"
        if self.early_stopping_patience is None:
            unused["early_stopping_threshold"] = "without job.early_stopping_patience no run stops early"
        return unused | ({"max_bad_steps": "job.on_bad_step=stop ends the run"} if self.on_bad_step == "stop" else {})

    def validate(self) -> Iterator[ConfigError]:
        """Reject counts that make no training run."""
        yield from super().validate()
        yield from self.validate_minimum(1, "log_every", "eval_sequences", "max_bad_steps", "early_stopping_patience")
        yield from self.validate_minimum(0, "early_stopping_threshold", "early_exit_loss")
        yield from self.validate_minimum(1, "early_exit_rotation")
        if not 0 <= self.layer_dropout < 1:
            yield self.error("layer_dropout", "must be from 0 to below 1", "set job.layer_dropout=0.1")
        if self.early_exit_loss and self.early_exit_curriculum == "gradual" and self.epochs is not None:
            why = "job.epochs leaves the number of steps to the ranks, and exits come by it"
            yield self.error("early_exit_curriculum", why, "set job.steps, or job.early_exit_curriculum=rotational")
        if self.epochs is not None and self.epochs <= 0:
            yield self.error("epochs", "must be above 0", "set job.epochs=1")
        if self.early_stopping_patience is not None and self.eval_every == 0:
            why = "job.eval_every=0 evaluates at the end only"
            yield self.error("early_stopping_patience", why, "set job.eval_every=50, or leave it out")
        yield from self.validate_minimum(0, "eval_every", "sample_tokens")
        if self.spike_factor is not None and self.spike_factor <= 1:
            yield self.error("spike_factor", "must be above 1", "set job.spike_factor=2, or leave it out")
        if self.dpo_beta <= 0:
            yield self.error("dpo_beta", "must be above 0", "set job.dpo_beta=0.1")
        if not 0 <= self.dpo_label_smoothing < 0.5:
            yield self.error("dpo_label_smoothing", "must be from 0 to below 0.5", "leave it out, or set 0.1")
        yield from validate_named("job.loss", LOSS, (self.loss,), own=(CROSS_ENTROPY,))
        yield from validate_named("job.callbacks", CALLBACK, self.callbacks)
        yield from validate_callback_metrics("job.callbacks", self.callbacks)
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            yield self.error(
                "peak_tflops", "must be above 0", "leave it out, or set it to the value in the device's data sheet"
            )

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject what the strategy cannot do, and policies without what they need."""
        yield from super().validate_run(run, world_size=world_size)
        if self.sample_prompts and not isinstance(run.data, Corpus):
            why = f"data={run.data.kind} has no tokenizer, so there is no text to continue"
            yield ConfigError("job.sample_prompts", why=why, fix="leave it out, or set data=text")
        if self.on_bad_step == "rewind" and not run.checkpoint.every:
            why = "rewinds to the newest checkpoint, and checkpoint.every=0 saves none"
            yield self.error("on_bad_step", why, "set checkpoint.every=100, or job.on_bad_step=skip")
        if self.on_bad_step == "skip" and not run.parallel.skips_steps:
            why = f"parallel={run.parallel.kind} updates the weights whatever the loss is"
            yield self.error("on_bad_step", why, "set job.on_bad_step=rewind, or parallel=ddp, fsdp, zero2 or pipeline")
        if self.objective in ("sft", "dpo") and not isinstance(run.data, AutoData):
            why = f"data={run.data.kind} holds no answers"
            yield self.error("objective", why, "set data=auto and data.path to conversations or preferences")
        name = run.checkpoint.best_metric.partition(":")[2]
        rewards = DPO_METRICS if self.objective == "dpo" else ()
        sources = run.data.held_out_source_names if isinstance(run.data, AutoData) else ()
        measured = ("loss", *self.metrics, *self.set_metrics, *rewards, *(f"{source}/loss" for source in sources))
        is_of_tasks = bool(self.eval_tasks) and name.startswith(TASK_METRICS)
        if name not in measured and not is_of_tasks:
            why = f"{name} is not measured: evaluations measure {', '.join(measured)}"
            fix = f"set checkpoint.best_metric={LOWEST_LOSS}, or add {name} to job.metrics"
            if "/" in name:
                fix = f"set checkpoint.best_metric={LOWEST_LOSS}, or name its text in job.eval_sets"
            yield ConfigError("checkpoint.best_metric", run.checkpoint.best_metric, why=why, fix=fix)
        yield from self._validate_early_exit(run, world_size=world_size)
        if self.loss != CROSS_ENTROPY and run.parallel.kind in _PIPELINES:
            why = f"parallel={run.parallel.kind} trains on {CROSS_ENTROPY} only"
            yield self.error("loss", why, f"set job.loss={CROSS_ENTROPY}, or parallel=ddp")

    def _validate_early_exit(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Yield why exits cannot be trained, or layers not dropped, with the rest of the run."""
        fields = [name for name in ("early_exit_loss", "layer_dropout") if getattr(self, name)]
        dims, family = run.parallel.dims(world_size), run.model.family()
        for field in fields:
            if dims.pipeline > 1 or run.parallel.kind in _PIPELINES:
                why = f"under parallel={run.parallel.kind} no rank has the whole model"
                yield self.error(field, why, "set parallel=ddp, fsdp, zero2 or zero3")
            if dims.tensor > 1:
                why = f"parallel.tensor={dims.tensor} splits the output head that exits share"
                yield self.error(field, why, "set parallel.tensor=1")
            if dims.sequence > 1:
                why = f"parallel.sequence_parallel={dims.sequence} splits sequences, which skip layers as a whole"
                yield self.error(field, why, "set parallel.sequence_parallel=1")
            if run.compile.kind != "false":
                why = "exits and skipped layers change what a block does at every step"
                yield ConfigError("compile", run.compile.kind, why=f"job.{field}: {why}", fix="set compile=false")
            if self.loss != CROSS_ENTROPY:
                yield self.error(field, f"job.loss={self.loss} has no exits", f"set job.loss={CROSS_ENTROPY}")
            if self.objective == "dpo":
                yield self.error(field, "job.objective=dpo has no exits", "leave it out")
            if family is not None and family not in EXIT_FAMILIES:
                why = f"{family} is none of the families whose head exits can share: {', '.join(sorted(EXIT_FAMILIES))}"
                yield self.error(field, why, "leave it out, or choose such a model")

    def validate_shapes(self, run: Run, data: AutoData, shapes: Collection[Shape]) -> Iterator[ConfigError]:
        """Yield contradictions between objective and data, and what cannot train on preferences."""
        if not shapes:
            return
        yield from self.validate_source_names(data, shapes)
        name = run.checkpoint.best_metric.partition(":")[2]
        is_of_source = name in {f"{source}/loss" for source in data.held_out_source_names}
        if is_of_source and name not in self.set_metrics and not data.separates_sources(shapes):
            why = "text without weights is one stream, whose sources are not distinguished"
            fix = "set data.weights or data.packing=true, or name its text in job.eval_sets"
            yield ConfigError("checkpoint.best_metric", run.checkpoint.best_metric, why=why, fix=fix)
        if "preference" not in shapes:
            yield from self._validate_single_answers(data, shapes)
        elif self.objective in ("next_token", "sft"):
            why = f"the data holds {SHAPES['preference']}"
            yield self.error("objective", why, "set job.objective=dpo, or give rows of single answers")
        else:
            yield from self._validate_preferences(run, data)

    def describe_shapes(self, run: Run, shapes: Collection[Shape]) -> Iterator[tuple[str, str]]:
        """Add the objective of preferences."""
        yield from super().describe_shapes(run, shapes)
        if "preference" in shapes:
            reference = "the weights before the first step"
            if run.lora is not None:
                reference = "the model without its adapter"
            if run.model.adapter is not None:
                reference = f"the model with the adapter {run.model.adapter}"
            yield "objective", f"dpo, beta {self.dpo_beta:g}"
            yield "reference", f"{reference}, computed for all pairs before the first step (reference.safetensors)"
            yield "rows", f"{counted(self.micro_batch, 'pair')} of a micro-batch are {2 * self.micro_batch}"

    def _validate_single_answers(self, data: AutoData, shapes: Collection[Shape]) -> Iterator[ConfigError]:
        text_only = set(shapes) == {"text"}
        found = " and ".join(sorted(SHAPES[shape] for shape in shapes))
        if self.objective == "dpo":
            why = f"the data holds {found}, no preferences"
            yield self.error("objective", why, "leave it out, or give rows with chosen and rejected answers")
        elif self.objective == "sft" and text_only:
            yield self.error("objective", "the data holds text without answers", "set job.objective=next_token")
        elif self.objective == "next_token" and not text_only and data.train_on != "all":
            why = f"the data holds {found}, and data.train_on={data.train_on} leaves tokens out"
            yield self.error("objective", why, "set data.train_on=all, or job.objective=sft")
        if self.objective == "auto":
            for field, default in (("dpo_beta", 0.1), ("dpo_label_smoothing", 0.0)):
                if getattr(self, field) != default:
                    fix = "leave it out, or give rows with chosen and rejected answers"
                    yield self.error(field, f"the data holds {found}, no preferences", fix)

    def _validate_preferences(self, run: Run, data: AutoData) -> Iterator[ConfigError]:
        what = "the data is preferences (job.objective=dpo), and"
        for field in ("early_exit_loss", "layer_dropout"):
            if getattr(self, field):
                yield self.error(field, f"{what} their loss has no exits", "leave it out")
        if run.parallel.kind in _PIPELINES:
            why = f"{what} no stage of a pipeline computes the probabilities of whole answers"
            yield ConfigError("parallel", run.parallel.kind, why=why, fix="set parallel=ddp, fsdp, zero2 or zero3")
        if (degree := getattr(run.parallel, "sequence_parallel", 1)) > 1:
            why = f"{what} no rank has the probability of a whole answer"
            yield ConfigError("parallel.sequence_parallel", degree, why=why, fix="set parallel.sequence_parallel=1")
        if data.packing:
            why = f"{what} both answers of a pair are rows of their own"
            yield ConfigError("data.packing", "true", why=why, fix="leave it out")
        if data.train_on != "assistant":
            why = f"{what} their answers alone count"
            yield ConfigError("data.train_on", data.train_on, why=why, fix="leave it out")
        if self.loss != CROSS_ENTROPY:
            yield self.error("loss", f"{what} their loss is another", f"set job.loss={CROSS_ENTROPY}")
        if self.metrics:
            why = f"{what} metrics of plugins are of single answers"
            yield ConfigError("job.metrics", f"[{','.join(self.metrics)}]", why=why, fix="leave it out")

    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return the optimizer steps; 0 where they follow from data that only a rank counts."""
        sequences = run.data.known_train_sequences
        if self.epochs is None:
            return self.steps
        return 0 if sequences is None else self.steps_of_epochs(sequences, self.batch(run, world_size=world_size))

    def steps_of_epochs(self, num_sequences: int, batch: Batch, *, done: int = 0, drawn: int = 0) -> int:
        """Return the optimizer steps of ``job.epochs``.

        Args:
            num_sequences: of the training split.
            batch: of a step.
            done: steps taken before, perhaps with another batch.
            drawn: sequences that they trained on.
        """
        assert self.epochs is not None, "the run counts epochs"
        left = self.epochs * num_sequences - drawn
        return max(1, done + max(0, math.ceil(left / batch.global_batch)))

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Add what decides the number of steps, and how often the model continues prompts."""
        yield from super().describe(run, world_size=world_size)
        if self.epochs is not None:
            sequences = run.data.known_train_sequences
            known = "the training sequences, which rank 0 counts and prints"
            yield "epochs", f"{self.epochs:g} of {known if sequences is None else f'{sequences:,} sequences'}"
        if self.early_exit_loss:
            which = {
                "rotational": f"after one in {self.early_exit_rotation} layers, other ones in each step",
                "gradual": "after one more layer from time to time, from the last on",
                "all": "after every layer",
            }
            yield "exits", f"{which[self.early_exit_curriculum]}, scale {self.early_exit_loss:g}"
        if self.layer_dropout:
            yield "layer dropout", f"from 0 at the first layer to {self.layer_dropout:g} at the last"
        if self.early_stopping_patience is not None:
            direction, _, name = run.checkpoint.best_metric.partition(":")
            better = f"eval/{name} that is {'lower' if direction == 'min' else 'higher'}"
            if self.early_stopping_threshold:
                better += f" by more than {self.early_stopping_threshold:g}"
            times = counted(self.early_stopping_patience, "evaluation")
            yield "stops early", f"after {times} without an {better}"
        if self.sample_prompts:
            every = f"every {self.eval_every} steps, and" if self.eval_every else "only"
            texts = f"{counted(len(self.sample_prompts), 'prompt')}, {self.sample_tokens} tokens each"
            yield "samples", f"{texts}: {every} at the end (samples.jsonl)"

    def files(self) -> Iterator[str]:
        """Yield the picture of the losses and the sample."""
        yield "loss.png"
        if self.sample_tokens:
            yield "sample.txt"
        if self.sample_prompts:
            yield "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class Evaluate(PluggableJob):
    """Forward passes over the held-out split, under any strategy; nothing is trained."""

    kind: ClassVar[str] = "evaluate"
    trains: ClassVar[bool] = False
    resumes: ClassVar[bool] = True
    handles_preemption: ClassVar[bool] = True

    split: Literal["held_out", "all"] = "held_out"
    """``held_out`` measures the held-out end of the data, ``all`` every token of it, once."""

    eval_sequences: int = 64
    """Held-out sequences, over all ranks; fewer where the data has fewer."""

    stride: int | None = None
    """Tokens between the starts of two windows over a whole text: ``split=all``, ``eval_sets``.
    ``null`` is ``sequence_length``: windows do not overlap. A smaller one gives tokens more context and takes more
    time; each token counts once all the same."""

    repeats: int = 1
    """Number of repetitions; the first one also warms up, so speed is that of the fastest."""

    @property
    def window_stride(self) -> int:
        """Tokens between the starts of two windows over a whole text."""
        return self.stride or self.sequence_length

    @property
    def profile_unit(self) -> ProfileUnit:
        """Its own steps."""
        return "steps"

    def unused_options(self, run: Run) -> Mapping[str, str]:
        """Return a count that limits nothing, and a stride without windows."""
        if self.split == "all":
            return {"eval_sequences": "job.split=all counts every token"}
        return {} if self.eval_sets else {"stride": "held-out sequences do not overlap: only whole texts have a stride"}

    def validate(self) -> Iterator[ConfigError]:
        """Reject counts that measure nothing, and strides that skip tokens."""
        yield from super().validate()
        yield from self.validate_minimum(1, "eval_sequences", "repeats", "stride")
        if self.stride is not None and self.stride > self.sequence_length:
            why = f"skips tokens between windows of {self.sequence_length}"
            yield self.error("stride", why, f"set job.stride={self.sequence_length // 2}, or leave it out")

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject the whole of data without an end."""
        yield from super().validate_run(run, world_size=world_size)
        if self.split == "all" and not isinstance(run.data, Corpus):
            why = f"data={run.data.kind} is made up and has no end"
            yield self.error("split", why, "set job.split=held_out, or data=text")

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield what is counted."""
        yield from super().describe(run, world_size=world_size)
        if self.split == "all":
            yield "counted", "every token of the data, once"

    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return the global batches of all repeats, the last of each perhaps not full.

        How many a whole text has is known once it is tokenised: progress counts them, and this counts a text as one.
        """
        if self.split == "all":
            return self.repeats
        return self.repeats * -(-self.eval_sequences // self.batch(run, world_size=world_size).global_batch)

    def num_sequences(self, run: Run, *, world_size: int) -> int:
        """Return those of all repeats; 0 where only ranks, which tokenise the text, know them."""
        return 0 if self.split == "all" else self.repeats * self.eval_sequences

    def files(self) -> Iterator[str]:
        """Yield the table of the losses."""
        yield "evaluation.md"
