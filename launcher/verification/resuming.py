"""The check ``resume`` of job verify: save under each strategy, go on under each other."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.export import ExportOptions
from launcher.config.job.verify import Placement, ResumePairs, select_pairs
from launcher.errors import JobError
from launcher.protocol.metrics import MetricsWriter
from launcher.protocol.state_files import MODEL_FOLDER
from launcher.utils.files import sha256_of, write_atomic, write_json
from launcher.utils.text import format_table
from launcher.verification.comparison import error_of, largest_difference, markdown_row, plain_number
from launcher.verification.forked_ranks import CaseAnswer, ForkedRanks, preload_modules

if TYPE_CHECKING:
    from launcher.config.job.verify import Verify
    from launcher.engines.base import Engine
    from launcher.engines.context import Context


_NUM_TOKENS = 16
"""Of the text whose logits are compared."""


@dataclass(frozen=True, kw_only=True)
class ResumeResult:
    """A checkpoint that was resumed, compared with the run that went on."""

    source: Placement
    target: Placement
    loss_diff: float = math.inf
    """Largest relative difference of the losses after the checkpoint."""
    undisturbed_diff: float = math.inf
    """The same between undisturbed runs of the two strategies."""
    exports_equal: bool = False
    """Whether the model computes the same logits when the target saves it again.

    Both checkpoints are exported, and compared to the bit.
    """
    error: str = ""
    """Why there is nothing to compare."""

    def allowed(self, job: Verify) -> float:
        """Return the difference up to which it passes."""
        return max(job.resume_tolerance, self.undisturbed_diff if math.isfinite(self.undisturbed_diff) else 0.0)

    def why(self, job: Verify) -> str:
        """Return the reason why it failed; empty if it passed."""
        if self.error or (self.loss_diff <= self.allowed(job) and self.exports_equal):
            return self.error
        if not self.exports_equal:
            return "saved again and exported, the model computes other logits"
        return f"loss differs by {self.loss_diff:.1e} (allowed {self.allowed(job):.1e})"


def verify_resume(job: Verify, context: Context) -> None:
    """Take part in every case; rank 0 compares, writes and prints.

    Raises:
        JobError: on rank 0, when a checkpoint does not go on as it did; names the worst.
    """
    chosen = select_pairs(job, context.run, world_size=context.world_size)
    preload_modules(context, deepspeed=any(case.parallel.engine == "deepspeed" for case in chosen.cases.values()))
    ResumeVerification(job, context, chosen).run()


@dataclass
class ResumeVerification:
    """One rank's part."""

    job: Verify
    context: Context
    chosen: ResumePairs
    _undisturbed: dict[Placement, CaseAnswer] = field(default_factory=dict)
    _logits: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._phase, self._done = "", 0
        self._ranks = ForkedRanks(
            self.context, folder="verify", limit_s=self.job.case_timeout_s, heartbeat=self._heartbeat
        )
        self._saved = self._ranks.rendezvous.folder / "saved"

    def run(self) -> None:
        """Save every checkpoint, then resume each where it is to be."""
        rows: list[ResumeResult] = []
        with MetricsWriter(self.context.run_dir.metrics) if self.context.is_main else nullcontext() as writer:
            for source in self.chosen.sources:
                self._undisturbed[source] = self._answer(f"save {source}", source, [])
                self._done += 2 * self.job.steps
            for target, sources in self.chosen.targets.items():
                answer = self._answer(f"resume {target}", target, sources)
                self._done += self.job.steps * len(sources)
                if writer is not None:
                    new = [self._compare(source, target, answer) for source in sources]
                    writer.record(self.job.steps, **_metrics(new))
                    rows += new
        if self.context.is_main:  # threads may start now: nothing is forked any more
            self._phase = "export"
            rows = [self._with_export(row) for row in rows]
            shutil.rmtree(self._saved, ignore_errors=True)
        self._ranks.finish()
        self._phase = "done"
        self._heartbeat()
        if self.context.is_main:
            self._report(rows)

    def _answer(self, name: str, place: Placement, resumed: Sequence[Placement]) -> CaseAnswer:
        """Return, on rank 0, the losses of a case, or its error."""
        self._phase, started = name, time.monotonic()

        def work(context: Context) -> CaseAnswer:
            return take_case(self.job, context, folder=self._saved, place=place, resumed=resumed)

        run = self.chosen.cases[place.name].apply(
            self.context.run, world_size=place.ranks, sequences=self.chosen.sequences
        )
        answers = self._ranks.run_case(name.replace(" ", "_"), work, run=run, world_size=place.ranks)
        if not self.context.is_main:
            return {}
        error = error_of(answers)
        print(f"{name}: {error or 'done'} ({time.monotonic() - started:.1f} s)", flush=True)
        return {"error": error} if error else answers[0]

    def _compare(self, source: Placement, target: Placement, answer: CaseAnswer) -> ResumeResult:
        before, other = self._undisturbed[source], self._undisturbed.get(target, {})
        for found, what in ((before, f"{source} saved nothing"), (answer, f"{target} failed")):
            if "error" in found:
                return ResumeResult(source=source, target=target, error=f"{what}: {found['error']}")
        undisturbed = largest_difference(other["losses"], before["losses"]) if "losses" in other else math.inf
        return ResumeResult(
            source=source,
            target=target,
            loss_diff=largest_difference(answer["resumed"][str(source)], before["losses"]),
            undisturbed_diff=undisturbed,
        )

    def _with_export(self, row: ResumeResult) -> ResumeResult:
        """Return a result with whether both checkpoints export the same model."""
        if row.error:
            return row
        self._heartbeat()
        names = (str(row.source), _again(row.source, row.target))
        for name in names:
            if name not in self._logits:
                self._logits[name] = _exported_logits(self._saved / name)
        return replace(row, exports_equal=self._logits[names[0]] == self._logits[names[1]])

    def _heartbeat(self) -> None:
        self.context.heartbeat.update(self._phase, self._done)

    def _report(self, rows: list[ResumeResult]) -> None:
        job, folder = self.job, self.context.run_dir.path
        write_json(folder / "verify.json", _as_json(rows, job, self.chosen))
        write_atomic(folder / "verify.md", "\n".join(_markdown(rows, job, self.chosen)) + "\n")
        print("\n".join(format_table([_HEAD, *(_cells(row, job) for row in rows)])), flush=True)
        failed = [row for row in rows if row.why(job)]
        if failed:
            worst = max(failed, key=lambda row: row.loss_diff)
            raise JobError(
                f"{len(failed)} of {len(rows)} checkpoints do not go on as they did; the worst is {worst.source} "
                f"resumed as {worst.target}: {worst.why(job)}; all are in {folder / 'verify.md'}"
            )
        print(f"all {len(rows)} checkpoints go on as they did: {folder / 'verify.md'}", flush=True)


def take_case(
    job: Verify, context: Context, *, folder: Path, place: Placement, resumed: Sequence[Placement]
) -> CaseAnswer:
    """Save and go on, or load checkpoints one after the other and go on from each.

    Args:
        job: of the user's run.
        context: of this rank in the case.
        folder: of all checkpoints.
        place: this case.
        resumed: checkpoints to load; where there is none, this case saves its own.

    Returns:
        ``losses`` after the checkpoint, or ``resumed``: those after each checkpoint by where it was saved.
    """
    import torch

    from launcher.data.dataloader import Loader
    from launcher.data.dataset import open_run_splits
    from launcher.engines.base import make_engine
    from launcher.engines.distributed import barrier
    from launcher.profiling.performance import StepClock

    splits = open_run_splits(context.run)
    loader = Loader(splits, context.batch, seed=job.seed, rank=context.data_rank)
    before, after = range(job.steps), range(job.steps, 2 * job.steps)
    with make_engine(context, StepClock(context.heartbeat, cuda=torch.cuda.is_available())) as engine:
        if not resumed:
            _losses(engine, context, loader, before)
            own = folder / str(place)
            own.mkdir(parents=True, exist_ok=True)
            barrier()
            _save(engine, context, own)
            return {"losses": _losses(engine, context, loader, after, perturb=job.perturb)}
        losses = {}
        for source in resumed:
            engine.load(folder / str(source))
            again = folder / _again(source, place)
            again.mkdir(parents=True, exist_ok=True)
            barrier()
            _save(engine, context, again)
            losses[str(source)] = _losses(engine, context, loader, after)
        return {"resumed": losses}


def _again(source: Placement, target: Placement) -> str:
    """Return where a checkpoint is saved again as soon as it was loaded elsewhere."""
    return f"again/{source}/{target}"


def _save(engine: Engine, context: Context, folder: Path) -> None:
    from launcher.models.weights import save_model_config

    engine.save(folder)
    if context.is_main:
        save_model_config(engine.model_config, folder / MODEL_FOLDER)


def _exported_logits(checkpoint: Path) -> str:
    """Export a checkpoint; return a hash of the logits that Transformers computes with it."""
    import torch
    from transformers import AutoModelForCausalLM

    from launcher.models.export import ModelExport

    folder = checkpoint / "exported"
    shard_bytes = ExportOptions().max_shard_bytes
    ModelExport(checkpoint / MODEL_FOLDER, dtype=torch.float32, max_shard_bytes=shard_bytes).write(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.arange(_NUM_TOKENS)[None] % model.config.vocab_size).logits
    shutil.rmtree(folder)
    return sha256_of(logits.numpy().tobytes())


def _losses(engine: Engine, context: Context, loader: Any, steps: range, *, perturb: float = 0.0) -> list[float]:
    run = context.run
    rates = (run.optimizer.lr * (1.0 + perturb) * run.schedule.factor(step, 2 * len(steps)) for step in steps)
    return [engine.step(loader.step(step), lr=rate).loss for step, rate in zip(steps, rates, strict=True)]


_HEAD = ("saved", "resumed", "loss", "undisturbed", "exported", "")


def _cells(row: ResumeResult, job: Verify) -> list[str]:
    numbers = [f"{diff:.1e}" if math.isfinite(diff) else "-" for diff in (row.loss_diff, row.undisturbed_diff)]
    numbers.append("equal" if row.exports_equal else "differs")
    return [str(row.source), str(row.target), *numbers, f"FAIL: {row.why(job)}" if row.why(job) else "ok"]


def _markdown(rows: Sequence[ResumeResult], job: Verify, chosen: ResumePairs) -> Iterator[str]:
    yield f"# Checkpoints resumed elsewhere, {job.steps} steps before and after"
    yield ""
    yield f"Strategy@ranks, drawn by job.seed={job.seed}. Relative differences of the loss, the largest of all steps:"
    yield "between the resumed run and the one that went on, and between undisturbed runs of the two strategies."
    yield f"Allowed: {job.resume_tolerance:g}, or as much as the undisturbed runs. Exported: whether the model,"
    yield "saved again under the second strategy and exported, gives the logits of the first checkpoint bit for bit."
    yield ""
    yield from (markdown_row(_HEAD), markdown_row(["---"] * len(_HEAD)))
    yield from (markdown_row(_cells(row, job)) for row in rows)
    if chosen.left_out:
        yield from ("", "Left out:", "", *(f"- {name}: {why}" for name, why in chosen.left_out.items()))


def _as_json(rows: Sequence[ResumeResult], job: Verify, chosen: ResumePairs) -> dict[str, Any]:
    """Return everything as plain data; a difference that is not finite is ``null``."""
    return {
        "steps": job.steps,
        "seed": job.seed,
        "resume_tolerance": job.resume_tolerance,
        "pairs": [
            {**{key: plain_number(value) for key, value in asdict(row).items()}, "passed": not row.why(job)}
            | {"source": str(row.source), "target": str(row.target)}
            for row in rows
        ],
        "left_out": dict(chosen.left_out),
    }


def _metrics(rows: Sequence[ResumeResult]) -> Mapping[str, float]:
    return {f"verify/{row.source}/{row.target}/loss_diff": row.loss_diff for row in rows}
