"""Metrics, printed lines and the loss curve of a training run, written by rank 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from launcher.profiling.performance import peak_flops, peak_memory_bytes
from launcher.protocol.metrics import MetricsWriter, SampleWriter

if TYPE_CHECKING:
    from types import TracebackType

    from launcher.config.job.train import Train
    from launcher.engines.base import Engine, StepResult
    from launcher.engines.context import Context


class Recorder:
    """Turns step results into metrics, printed lines and progress.

    Args:
        job: for how often to print.
        context: of this rank.
        engine: for its device and parameter count.
        start_step: steps already done when this process began.
        tokens: trained on in them.
    """

    def __init__(self, job: Train, context: Context, engine: Engine, *, start_step: int, tokens: int) -> None:
        self._context, self._job, self._device = context, job, engine.device
        self._cuda = engine.device.type == "cuda"
        self._writer: MetricsWriter | None = None
        self._samples: SampleWriter | None = None
        shape = context.run.model.shape()
        self._flops_per_token = shape.flops_per_token(self._job.sequence_length) if shape else None
        self._peak_flops = self._peak() if self._flops_per_token else None
        self._since_line: list[tuple[int, float]] = []
        self.begin(start_step, tokens=tokens)

    def begin(self, step: int, *, tokens: int) -> None:
        """Continue after ``step`` steps on ``tokens`` tokens, without the metrics of later steps."""
        self.close()
        if self._context.is_main:
            self._writer = MetricsWriter(self._context.run_dir.metrics, start_step=step)
            if self._job.sample_prompts:
                self._samples = SampleWriter(self._context.run_dir.samples, start_step=step)
        self._tokens = tokens
        self._since_line.clear()

    def _peak(self) -> float | None:
        """Return the peak FLOP/s of this rank's device, where one is stated."""
        import torch

        if self._job.peak_tflops is not None:
            return 1e12 * self._job.peak_tflops
        if not self._cuda:
            return None
        return peak_flops(torch.cuda.get_device_name(self._device), precision=self._context.run.precision.kind)

    def step(
        self,
        done: int,
        result: StepResult,
        *,
        lr: float,
        elapsed_s: float,
        parts: Mapping[str, float],
        padding: float | None = None,
    ) -> None:
        """Record one optimizer step.

        Args:
            done: steps done, this one included.
            result: of the engine.
            lr: learning rate of the step.
            elapsed_s: wall time of the step, from asking for its data to knowing its loss.
            parts: seconds of each phase.
            padding: share of the batch that holds no token; ``None`` of data that is never padded.
        """
        self._tokens += result.tokens
        speed = result.tokens / elapsed_s
        metrics = {
            "train/loss": result.loss,
            "train/lr": lr,
            "train/tokens": self._tokens,
            "train/skipped": float(result.skipped),
            "perf/tokens_per_s": speed,
            "memory/peak_bytes": peak_memory_bytes(cuda=self._cuda),
            **{f"time/{name}_s": seconds for name, seconds in parts.items()},
        }
        if result.grad_norm is not None:
            metrics["train/grad_norm"] = result.grad_norm
        if padding is not None:
            metrics["data/padding"] = padding
        if self._flops_per_token and self._peak_flops:
            flops = self._flops_per_token * speed / self._context.world_size
            metrics["perf/mfu"] = flops / self._peak_flops
        self.write(done, metrics)
        self._since_line.append((result.tokens, elapsed_s))
        self._context.heartbeat.update("step", done, steps=self._job.steps, loss=result.loss, tokens_per_s=speed)
        if done % self._job.log_every == 0 or done in (1, self._job.steps):
            self._print_step(done, result, lr, metrics.get("perf/mfu"))

    def _print_step(self, done: int, result: StepResult, lr: float, mfu: float | None) -> None:
        tokens, seconds = (sum(column) for column in zip(*self._since_line, strict=True))
        self._since_line.clear()
        norm = "" if result.grad_norm is None else f"  grad norm {result.grad_norm:.3f}"
        used = "" if mfu is None else f"  mfu {mfu:.1%}"
        skipped = "  (skipped)" if result.skipped else ""
        self.print(
            f"step {done}/{self._job.steps}  loss {result.loss:.4f}{norm}  lr {lr:.2e}"
            f"  {tokens / seconds:,.0f} tokens/s{used}{skipped}"
        )

    def baselines(self, done: int, losses: Mapping[str, float], *, unit: str) -> None:
        """Record the losses that a model has to beat."""
        self.write(done, {f"baseline/{name}": loss for name, loss in losses.items()})
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.print(f"loss to beat (nats a {unit}): {shown}")

    def evaluation(self, done: int, loss: float, *, metrics: Mapping[str, float], parts: Mapping[str, float]) -> None:
        """Record a held-out loss, and the metrics of plugins."""
        own = {f"eval/{name}": value for name, value in metrics.items()}
        times = {f"time/{name}_s": seconds for name, seconds in parts.items()}
        self.write(done, {"eval/loss": loss, **own, **times})
        shown = "".join(f"  {name} {value:.4f}" for name, value in metrics.items())
        self.print(f"step {done}/{self._job.steps}  held-out loss {loss:.4f}{shown}")

    def samples(self, done: int, texts: Sequence[tuple[str, str]]) -> None:
        """Record prompts with the texts that the model wrote, in samples.jsonl."""
        if self._samples is None:
            return
        for prompt, text in texts:
            self._samples.record(done, prompt=prompt, text=text)
            self.print(f"step {done}/{self._job.steps}  sample {text!r}")

    def callbacks(self, done: int, metrics: Mapping[str, float]) -> None:
        """Record what callbacks returned."""
        if metrics:
            self.write(done, metrics)

    def write(self, done: int, metrics: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl, on rank 0."""
        if self._writer is not None:
            self._writer.record(done, **metrics)

    def print(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self._context.is_main:
            print(text, flush=True)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; every line is in them already."""
        if self._writer is not None:
            self._writer.close()
        if self._samples is not None:
            self._samples.close()
