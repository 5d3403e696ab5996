"""``job=generate`` on a rank: its share of the lines, and on rank 0 the output."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from launcher.data.formats import BadFile
from launcher.data.rows import Record
from launcher.engines.distributed import disconnect
from launcher.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, ConfigErrors, JobError
from launcher.files import read_json, write_json
from launcher.generation.merge import merge
from launcher.generation.parts import Index, PartWriter
from launcher.generation.task import claim_output, keep_task, stored_task, task_of
from launcher.generation.work import Worker
from launcher.serving.choose import chosen_generator
from launcher.serving.ranks import engine_of_ranks
from launcher.serving.words import Words, open_words
from launcher.training.memory import peak_bytes
from launcher.training.metrics import MetricsWriter
from launcher.wording import times

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from launcher.context import Context
    from launcher.jobs.generate import Generate
    from launcher.serving.base import Generator
    from launcher.training.preemption import Preemption

_POLL_S = 0.2


def _records(job: Generate, records: Iterator[Record], words: Words, *, is_main: bool) -> Iterator[Record]:
    """Return the lines of the input; chats of the shipped file become prompts where there is no chat template."""
    if job.has_own_input or words.has_chat_template:
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


def generate(job: Generate, context: Context, preemption: Preemption) -> None:
    """Generate on this rank what is not there yet; rank 0 then puts all answers in order.

    Raises:
        ConfigError: the input cannot be read, or the run directory holds answers to something else.
        JobError: lines were bad; the answers to the others are written first.
        SystemExit: with the code that means "resume me", when the run was asked to make room.
    """

    def beat() -> None:
        context.heartbeat.beat("load")

    source, folder, output = job.source(), context.run_dir.generated, job.output_path(context.run_dir)
    try:
        size = source.count(beat=beat)
        task = task_of(context.run, job, source, digest=source.digest(beat=beat))
    except BadFile as bad:
        raise job.refuse("input", bad.why, bad.fix) from bad
    except OSError as error:
        raise job.refuse("input", str(error), "check the disk it is on") from error
    folder.mkdir(exist_ok=True)
    stored = stored_task(folder)
    if stored is not None and (problems := list(task.problems(stored, job))):
        raise ConfigErrors(problems)
    if (folder / "done").exists() and output.exists():
        print(f"all {size:,} lines are in {output} already", flush=True)
        _refuse_bad_lines(job, context, folder / "done", output=output, size=size)
        return
    if stored is None:
        keep_task(folder, task)
    index = Index(folder, size)
    index.scan()
    before = index.num_tokens
    words = open_words(job.tokenizer, context.run, beat=beat, template=job.chat_template)
    if job.spreads(context.run):
        ranks = 1
        generator = _engine_of_ranks(job, context, preemption, beat=beat)
        if generator is None:
            return
    else:
        generator = chosen_generator(context.run, job, beat=beat, local_rank=context.local_rank)
        ranks = context.world_size
    share = _share(context, index, ranks=ranks)
    generator.profiler = context.profiler
    preemption.hold()
    started = time.monotonic()
    with PartWriter(folder / f"rank{context.rank}.part") as parts:
        worker = Worker(
            records=_records(job, source.records(share), words, is_main=context.is_main),
            usual=job.usual,
            words=words,
            generator=generator,
            parts=parts,
            index=index,
            preemption=preemption,
            at_once=job.at_once,
            seed=job.seed,
            beat=lambda done, speed: context.heartbeat.beat("generate", done, steps=size, tokens_per_s=speed),
        )
        try:
            worker.run()
        finally:
            generator.close()
            disconnect()  # of ranks that are one engine; others have not met
        parts.sync()
        if not context.is_main:
            return
        while not index.is_complete:  # the other ranks are still at it
            worker.leave_if_asked()
            worker.tell()
            time.sleep(_POLL_S)
    seconds = time.monotonic() - started
    claim_output(folder, output)
    merge(index, output, beat=lambda: context.heartbeat.beat("merge", size))
    _conclude(context, index, size=size, seconds=seconds, tokens=index.num_tokens - before)
    write_json(folder / "done", {"bad": index.num_errors, "first": _line_of(output, index.first_error)})
    for part in folder.glob("*.part"):
        part.unlink()
    print(f"answers: {output}", flush=True)
    _refuse_bad_lines(job, context, folder / "done", output=output, size=size)


def _line_of(output: Path, number: int | None) -> str:
    """Return what the output says of a bad line."""
    if number is None:
        return ""
    with output.open("rb") as file:
        found = json.loads(next(itertools.islice(file, number, None)))
    return f"line {found['line']:,}: {found['error']}"


def _refuse_bad_lines(job: Generate, context: Context, done: Path, *, output: Path, size: int) -> None:
    """End the run on the first rank as one with bad input if a line had no answer; the output is there all the same.

    Raises:
        JobError: with the code for bad input.
    """
    if not context.is_main or not done.stat().st_size:  # runs of earlier versions left an empty file
        return
    ended = read_json(done)
    if ended["bad"]:
        why = f"{ended['bad']:,} of {times(size, 'line')} {'is' if ended['bad'] == 1 else 'are'} bad"
        where = f"{output} holds the answers to the others, and each bad line's reason in its field error"
        raise JobError(f"job.input={job.input}: {why}. {where}. First, {ended['first']}", exit_code=EXIT_BAD_INPUT)


def _engine_of_ranks(
    job: Generate, context: Context, preemption: Preemption, *, beat: Callable[[], None]
) -> Generator | None:
    """Return the engine on the first rank, which says when to leave; nothing on others, once it is closed.

    Raises:
        SystemExit: with the code that means "resume me", when the run was asked to make room.
    """
    if context.is_main:
        return engine_of_ranks(context, limits=job.limits, beat=beat)
    preemption.hold()
    try:
        engine_of_ranks(context, limits=job.limits, beat=beat)
    except RuntimeError:
        if not preemption.requested():
            raise
        print("the first rank has left while the model was loaded, as it was asked to", flush=True)
    if preemption.requested():
        raise SystemExit(EXIT_PREEMPTED)
    return None


def _share(context: Context, index: Index, *, ranks: int) -> Callable[[int], bool]:
    """Return which records this rank does: one in so many, unless it is there already."""
    return lambda number: number % ranks == context.rank % ranks and number not in index


def _conclude(context: Context, index: Index, *, size: int, seconds: float, tokens: int) -> None:
    """Record what was done, and say it."""
    with MetricsWriter(context.run_dir.metrics) as metrics:
        metrics.record(
            size,
            **{
                "generate/lines": size,
                "generate/errors": index.num_errors,
                "generate/tokens": index.num_tokens,
                "perf/tokens_per_s": tokens / seconds,
                "memory/peak_bytes": peak_bytes(cuda=torch.cuda.is_available()),
            },
        )
    bad = f", {index.num_errors:,} of them bad: each says why in its field error" if index.num_errors else ""
    speed = f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
    print(f"{size:,} lines{bad}; {speed}", flush=True)
