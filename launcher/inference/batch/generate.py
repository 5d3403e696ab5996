"""The job ``generate`` on a rank: lines to the engine, answers to disk; without torch.

The echo engine needs none.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from launcher.config.data.formats import BadFile
from launcher.config.data.rows import Record
from launcher.config.job.generate import fingerprint_of, store_fingerprint, stored_fingerprint
from launcher.config.prompt_file import BadLine
from launcher.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, ConfigErrors, JobError
from launcher.inference.batch.output import PartIndex, PartWriter, claim_output, merge_parts
from launcher.inference.batch.requests import GenerationResult, error_line, parse_request
from launcher.inference.engine.base import EngineRequest, InvalidRequest, describe_speculation
from launcher.inference.engine.registry import make_engine
from launcher.inference.tokenizer import TextTokenizer, open_tokenizer
from launcher.profiling.performance import peak_memory_bytes
from launcher.protocol.metrics import MetricsWriter
from launcher.utils.files import read_json, write_json
from launcher.utils.text import counted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from launcher.config.job.generate import Generate
    from launcher.engines.context import Context
    from launcher.engines.preemption import Preemption
    from launcher.inference.engine.base import EngineOutput, EngineStats, InferenceEngine


_QUEUE_FACTOR = 4
"""Lines in memory per request in progress, for the scheduler to choose among."""
_SCAN_S = 1.0
_MAX_PRINTED_ERRORS = 20


@dataclass(kw_only=True)
class BatchWorker:
    """Generates the missing answers of one rank's share."""

    records: Iterator[Record]
    default_fields: Mapping[str, Any]
    """Sampling of lines that say nothing else."""
    tokenizer: TextTokenizer
    engine: InferenceEngine
    parts: PartWriter
    index: PartIndex
    preemption: Preemption
    max_concurrent: int
    """Requests that the engine processes at the same time."""
    seed: int
    models: Mapping[str, str] = field(default_factory=dict)
    """Adapter of each name that a line may choose; empty is the base model."""
    heartbeat: Callable[[int, float], None]
    """Called with the records that all ranks completed, and this rank's tokens a second."""

    _results: dict[str, GenerationResult] = field(default_factory=dict)
    _tokens: int = 0
    _num_rejected: int = 0
    _scanned_at: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Run until this rank's share is done.

        Raises:
            SystemExit: with the code that means "resume me", when the run was asked to make room.
        """
        exhausted = False
        while not exhausted or self._results:
            self.exit_if_preempted()
            room = _QUEUE_FACTOR * self.max_concurrent - len(self._results)
            if not exhausted:
                exhausted = self._admit(room)
            for output in self.engine.step():
                if result := self._results.get(output.request_id):
                    self._tokens += len(output.tokens)
                    if finish := result.add_output(output):
                        self._write(output, result, finish)
                        if output.finish_reason is None:
                            self.engine.cancel(output.request_id)
            self.report_progress()

    def exit_if_preempted(self) -> None:
        """Exit if a preemption was requested: answers on disk are kept, others are generated again."""
        if self.preemption.requested():
            self.parts.sync()
            raise SystemExit(EXIT_PREEMPTED)

    def report_progress(self) -> None:
        """Report the progress of all ranks, from their files."""
        now = time.monotonic()
        if now - self._scanned_at > _SCAN_S:
            self._scanned_at = now
            self.index.scan()
        self.heartbeat(self.index.num_done, self._tokens / (now - self._started + 1e-9))

    def _admit(self, room: int) -> bool:
        """Submit lines to the engine; return whether none is left."""
        taken = 0
        for record in itertools.islice(self.records, max(0, room)):
            taken += 1
            try:
                parsed = parse_request(record, self.default_fields, self.tokenizer, seed=self.seed, models=self.models)
                request = EngineRequest(
                    id=str(record.number), prompt=parsed.prompt, sampling=parsed.sampling, adapter=parsed.adapter
                )
                self.engine.add(request)
            except (BadLine, InvalidRequest) as bad:
                why = f"{bad.param}: {bad}" if isinstance(bad, InvalidRequest) else str(bad)
                self._reject(record, why)
            else:
                self._results[request.id] = GenerationResult(record, parsed, self.tokenizer)
        return taken < room

    def _reject(self, record: Record, why: str) -> None:
        self._num_rejected += 1
        if self._num_rejected <= _MAX_PRINTED_ERRORS:
            print(f"line {record.line}: {why}", flush=True)
        elif self._num_rejected == _MAX_PRINTED_ERRORS + 1:
            print("more lines are bad: only the answers say which", flush=True)
        self.parts.append(record.number, error_line(record, why), is_error=True)

    def _write(self, output: EngineOutput, result: GenerationResult, finish: str) -> None:
        del self._results[output.request_id]
        if finish in ("stop", "length"):
            line = result.line("stop" if finish == "stop" else "length")
            self.parts.append(result.record.number, line, tokens=result.num_tokens)
        elif finish == "error":
            self._reject(result.record, f"{output.param}: {output.error}" if output.param else output.error)
        else:
            raise JobError(f"the engine ended line {result.record.line} as {finish}, which was not requested")


_POLL_S = 0.2


def _records(job: Generate, records: Iterator[Record], tokenizer: TextTokenizer, *, is_main: bool) -> Iterator[Record]:
    """Return the lines of the input.

    Chats of the shipped file become prompts where there is no chat template.
    """
    if job.has_own_input or tokenizer.has_chat_template:
        return records
    if is_main:
        print("job.input=sample: this tokenizer has no chat template, so chats are given as plain prompts", flush=True)
    return map(_as_prompt, records)


def _as_prompt(record: Record) -> Record:
    chat = record.fields.get("messages")
    if chat is None:
        return record
    fields = {name: value for name, value in record.fields.items() if name != "messages"}
    return replace(record, fields={**fields, "prompt": chat[-1]["content"]})


def generate(job: Generate, context: Context) -> None:
    """Generate this rank's missing answers; rank 0 then merges all answers in order.

    Raises:
        ConfigError: the input cannot be read, or the run directory holds answers to something else.
        JobError: lines were bad; the answers to the others are written first.
        SystemExit: with the code that means "resume me", when the run was asked to make room.
    """

    def heartbeat() -> None:
        context.heartbeat.update("load")

    preemption = context.preemption
    source, folder, output = job.source(), context.run_dir.generated, job.output_path(context.run_dir)
    try:
        size = source.count(heartbeat=heartbeat)
        task = fingerprint_of(context.run, job, source, digest=source.digest(heartbeat=heartbeat))
    except BadFile as bad:
        raise job.error("input", bad.why, bad.fix) from bad
    except OSError as error:
        raise job.error("input", str(error), "check the disk it is on") from error
    folder.mkdir(exist_ok=True)
    stored = stored_fingerprint(folder)
    if stored is not None and (errors := list(task.validate_stored(stored, job))):
        raise ConfigErrors(errors)
    if (folder / "done").exists() and output.exists():
        print(f"all {size:,} lines are in {output} already", flush=True)
        _fail_on_bad_lines(job, context, folder / "done", output=output, size=size)
        return
    if stored is None:
        store_fingerprint(folder, task)
    index = PartIndex(folder, size)
    index.scan()
    before = index.num_tokens
    tokenizer = open_tokenizer(job.tokenizer, context.run, heartbeat=heartbeat, template=job.chat_template)
    if job.is_model_parallel(context.run):
        ranks = 1
        engine = _engine_of_ranks(job, context, heartbeat=heartbeat)
        if engine is None:
            return
    else:
        engine = make_engine(context.run, job, heartbeat=heartbeat, local_rank=context.local_rank)
        ranks = context.world_size
    share = _share(context, index, ranks=ranks)
    engine.profiler = context.profiler
    preemption.defer()
    started = time.monotonic()
    with PartWriter(folder / f"rank{context.rank}.part") as parts:
        worker = BatchWorker(
            records=_records(job, source.records(share), tokenizer, is_main=context.is_main),
            default_fields=job.default_fields,
            tokenizer=tokenizer,
            engine=engine,
            parts=parts,
            index=index,
            preemption=preemption,
            max_concurrent=job.max_concurrent,
            seed=job.seed,
            models=job.models(context.run),
            heartbeat=lambda done, speed: context.heartbeat.update("generate", done, steps=size, tokens_per_s=speed),
        )
        try:
            worker.run()
            stats = engine.stats()
        finally:
            engine.close()
            if job.is_model_parallel(context.run):
                from launcher.engines.distributed import disconnect

                disconnect()
        parts.sync()
        if stats.decoded_tokens_total:
            print(f"speculation: {describe_speculation(stats)}", flush=True)
        if not context.is_main:
            return
        while not index.is_complete:  # the other ranks are still at it
            worker.exit_if_preempted()
            worker.report_progress()
            time.sleep(_POLL_S)
    seconds = time.monotonic() - started
    claim_output(folder, output)
    merge_parts(index, output, heartbeat=lambda: context.heartbeat.update("merge", size))
    _record_metrics(context, index, stats, size=size, seconds=seconds, tokens=index.num_tokens - before)
    write_json(folder / "done", {"bad": index.num_errors, "first": _line_of(output, index.first_error)})
    for part in folder.glob("*.part"):
        part.unlink()
    print(f"answers: {output}", flush=True)
    _fail_on_bad_lines(job, context, folder / "done", output=output, size=size)


def _line_of(output: Path, number: int | None) -> str:
    """Return the output line of a bad line."""
    if number is None:
        return ""
    with output.open("rb") as file:
        found = json.loads(next(itertools.islice(file, number, None)))
    return f"line {found['line']:,}: {found['error']}"


def _fail_on_bad_lines(job: Generate, context: Context, done: Path, *, output: Path, size: int) -> None:
    """Fail on the first rank with the code for bad input if a line had no result.

    The output is complete all the same.

    Raises:
        JobError: with the code for bad input.
    """
    if not context.is_main or not done.stat().st_size:  # runs of earlier versions left an empty file
        return
    ended = read_json(done)
    if ended["bad"]:
        why = f"{ended['bad']:,} of {counted(size, 'line')} {'is' if ended['bad'] == 1 else 'are'} bad"
        where = f"{output} holds the answers to the others, and each bad line's reason in its field error"
        raise JobError(f"job.input={job.input}: {why}. {where}. First, {ended['first']}", exit_code=EXIT_BAD_INPUT)


def _engine_of_ranks(job: Generate, context: Context, *, heartbeat: Callable[[], None]) -> InferenceEngine | None:
    """Return the engine on the first rank, which decides when to exit; nothing on others.

    Others return once it is closed.

    Raises:
        SystemExit: with the code that means "resume me", when the run was asked to make room.
    """
    from launcher.inference.engine.paged_engine import make_engine_across_ranks

    if context.is_main:
        return make_engine_across_ranks(context, limits=job.limits, heartbeat=heartbeat)
    preemption = context.preemption
    preemption.defer()
    try:
        make_engine_across_ranks(context, limits=job.limits, heartbeat=heartbeat)
    except RuntimeError:
        if not preemption.requested():
            raise
        print("the first rank exited while the model was loaded, as requested", flush=True)
    if preemption.requested():
        raise SystemExit(EXIT_PREEMPTED)
    return None


def _share(context: Context, index: PartIndex, *, ranks: int) -> Callable[[int], bool]:
    """Return which records this rank does: one in so many, unless it is there already."""
    return lambda number: number % ranks == context.rank % ranks and number not in index


def _uses_cuda() -> bool:
    """Return whether the engine may use a GPU; one without torch, such as echo, does not."""
    return "torch" in sys.modules and bool(sys.modules["torch"].cuda.is_available())


def _record_metrics(
    context: Context, index: PartIndex, stats: EngineStats, *, size: int, seconds: float, tokens: int
) -> None:
    """Record what was done, and say it."""
    drafted = {}
    if stats.decoded_tokens_total:
        drafted = {"generate/acceptance": stats.acceptance, "generate/layer_share": stats.layer_share}
    with MetricsWriter(context.run_dir.metrics) as metrics:
        metrics.record(
            size,
            **{
                "generate/lines": size,
                "generate/errors": index.num_errors,
                "generate/tokens": index.num_tokens,
                "perf/tokens_per_s": tokens / seconds,
                **drafted,
                "memory/peak_bytes": peak_memory_bytes(cuda=_uses_cuda()),
            },
        )
    bad = f", {index.num_errors:,} of them bad: each says why in its field error" if index.num_errors else ""
    speed = f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
    print(f"{size:,} lines{bad}; {speed}", flush=True)
