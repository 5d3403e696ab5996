"""Refusals that need more than one group, or the hosts: each names the option, the arithmetic and what would work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from launcher import env, numerics
from launcher.attention import unsupported
from launcher.benchmarks.base import Benchmark
from launcher.config import Run, run_to_tree
from launcher.data.base import Corpus
from launcher.data.synthetic import Synthetic
from launcher.errors import ConfigError
from launcher.jobs.base import BatchedJob
from launcher.jobs.generating import GeneratingJob
from launcher.jobs.quantize import Quantize
from launcher.models.installed import attention_marks
from launcher.parallel.family import family_refusals
from launcher.plan import Host
from launcher.run_index import INDEX
from launcher.secrecy import is_secret_value, secret_variable_in
from launcher.topology import first_ranks
from launcher.wording import flat

_MOST_NAME_BYTES = 200
"""Of a folder's name; file systems allow 255."""
_NO_CHECKPOINTS = ("0", "false", "default")
"""Values of the group checkpoint that ask for none."""


def refusals(run: Run, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    """Yield everything that keeps ``run`` from working on ``hosts``, except the batch equation."""
    world_size = sum(host.slots for host in hosts)
    yield from _refuse_degrees(run, world_size)
    yield from run.parallel.refusals(world_size, run.precision, optimizer=run.optimizer, shape=run.model.shape())
    if isinstance(run.job, BatchedJob):
        yield from _refuse_accumulation(run, run.job)
        yield from _refuse_split_sequences(run, run.job, world_size)
        yield from numerics.refusals(run, run.job, hosts)
        yield from _refuse_long_sequences(run, run.job)
        yield from _refuse_vocabulary(run)
    yield from _refuse_name(run)
    yield from _refuse_family(run, world_size)
    yield from _refuse_too_many_ranks(hosts)
    yield from _refuse_uneven_hosts(run, hosts)
    yield from env.refusals(run.backend.env, forward=getattr(run.backend, "forward", None))
    yield from _refuse_secrets(run)
    yield from _refuse_unknown_ranks(run, hosts)
    yield from run.backend.refusals(hosts)
    yield from _refuse_quantization(run)
    yield from _refuse_resume(run)
    yield from run.job.refusals(run, world_size=world_size)
    yield from _refuse_profile(run, world_size)


def _refuse_secrets(run: Run) -> Iterator[ConfigError]:
    """Refuse secrets in every other option: ranks, run.yaml, plan.json and W&B get them all as they are."""
    for option, value in flat(run_to_tree(run)):
        if name := secret_variable_in(value, os.environ):
            why = f"holds the value of the variable {name}, and run.yaml is written to disk"
            yield ConfigError(option, why=why, fix=f"leave it out: ranks on this machine have {name} of your shell")
        elif not option.startswith("backend.env.") and is_secret_value(value):
            why = "holds a secret (a password in an address, a token or a key), and run.yaml is written to disk"
            fix = "leave the secret out; export it in your shell under the name that the library reads (HF_TOKEN, …)"
            yield ConfigError(option, why=why, fix=fix)


def _refuse_name(run: Run) -> Iterator[ConfigError]:
    """Refuse a name that is a path, or none: it is one folder below ``run.root``."""
    name = run.run.name
    if not name.strip() or name in (".", "..") or "/" in name:
        last = name.rstrip("/").rpartition("/")[2]
        example = last if last.strip() not in ("", ".", "..") else "mine"
        why = "is empty" if not name.strip() else "is a path, and the name of a run is one folder below run.root"
        fix = f"set run.name={example}; run.root names the folder of all runs, run.dir that of this one"
        yield ConfigError("run.name", name, why=why, fix=fix)
    elif name == INDEX:
        why = "is the file that lists runs with directories of their own"
        yield ConfigError("run.name", name, why=why, fix="set another name")
    elif not name.isprintable() or len(name.encode()) > _MOST_NAME_BYTES:
        why = f"holds a control character, or more than {_MOST_NAME_BYTES} bytes"
        yield ConfigError("run.name", name, why=why, fix="set a shorter one of printable characters")


def _refuse_profile(run: Run, world_size: int) -> Iterator[ConfigError]:
    try:
        num_steps = run.job.num_steps(run, world_size=world_size)
    except ConfigError:
        return  # the batch does not come out even, which the plan refuses
    yield from run.profile.refusals(run.job.profiled_by, num_steps)


def refuse_unused(run: Run, words: Sequence[str]) -> Iterator[ConfigError]:
    """Yield each option on the command line that has no effect on the job; those of experiments may serve other jobs.

    Args:
        run: what they compose to.
        words: the overrides that the user typed.
    """
    groups = run.job.unused_groups(run)
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        group, _, option = key.partition(".")
        if group == "benchmark" and group in groups and value != "none":
            why = f"job={run.job.kind} measures no benchmark"
            yield ConfigError(key, value, why=why, fix=f"add job=benchmark, or leave {key} out")
        elif group in groups and group != "benchmark":
            why = f"job={run.job.kind} does not use the group {group}"
            yield ConfigError(key, value, why=why, fix=f"leave {key} out")
        elif group == "checkpoint" and option != "resume" and not run.job.saves and value not in _NO_CHECKPOINTS:
            why = f"job={run.job.kind} writes no checkpoints"
            yield ConfigError(key, value, why=why, fix=f"leave {key} out")


def _refuse_resume(run: Run) -> Iterator[ConfigError]:
    """Refuse a checkpoint where nothing is continued; ``auto`` starts any run again in its own directory."""
    resume = run.checkpoint.resume
    if run.job.resumes or resume in ("none", "auto"):
        return
    why = f"job={run.job.kind} continues no training run, and would ignore the checkpoint"
    takes_weights = not isinstance(run.benchmark, Benchmark) or run.benchmark.needs_model
    fix = f"set model.weights={resume} checkpoint.resume=none" if takes_weights else "leave it out"
    yield ConfigError("checkpoint.resume", resume, why=why, fix=fix)


def _refuse_quantization(run: Run) -> Iterator[ConfigError]:
    """Refuse methods where nothing is made of them, and layers in few bits where they would be learnt or sliced."""
    chosen, own = run.quantization.kind, run.model.quantization
    quantises = isinstance(run.job, Quantize)
    if chosen != "none" and not quantises:
        why = f"job={run.job.kind} makes no quantised weights"
        fix = f"set model.quantization={chosen} to use them, or job=quantize to keep them"
        yield ConfigError("quantization", chosen, why=why, fix=fix)
    if own == "none":
        return
    if quantises:
        why = "job=quantize starts from the original, and does what the group quantization says"
        fix = f"set model.quantization=none quantization={own}"
        yield ConfigError("model.quantization", own, why=why, fix=fix)
    else:
        yield from refuse_few_bits(run, "model.quantization", own, instead="set model.quantization=none")


def refuse_few_bits(run: Run, option: str, value: object, *, instead: str) -> Iterator[ConfigError]:
    """Yield why a run cannot have quantised weights.

    Args:
        run: what is asked for.
        option: by which the weights are quantised, as the user types it.
        value: of that option.
        instead: what would work with any run.
    """
    if isinstance(run.job, BatchedJob) and run.job.learns:
        why = f"job={run.job.kind} takes optimiser steps, and layers in few bits do not learn"
        yield ConfigError(option, value, why=why, fix=instead)
    elif isinstance(run.benchmark, Benchmark) and not run.benchmark.takes_few_bits:
        why = f"benchmark={run.benchmark.kind} trains the model, quantises it itself, or has none"
        yield ConfigError(option, value, why=why, fix=instead)
    elif run.parallel.kind not in ("single", "ddp", "pipeline"):
        why = f"parallel={run.parallel.kind} slices matrices, and quantised ones stay whole"
        yield ConfigError(option, value, why=why, fix="set parallel=single")


def _refuse_degrees(run: Run, world_size: int) -> Iterator[ConfigError]:
    """Refuse a world that the degrees do not divide, naming each of them."""
    fits = run.parallel.degrees(world_size)
    if fits.product == world_size:
        return
    unit = run.parallel.degrees(1).product
    nearest = sorted({max(unit, world_size // unit * unit), (world_size // unit + 1) * unit})
    fix = f"run on {' or '.join(map(str, nearest))} ranks (backend.ranks counts those of one host)"
    if run.parallel.degree_options:
        fix += f", or change {', '.join(f'parallel.{name}' for name in run.parallel.degree_options)}"
    why = f"{fits} does not fill the world of {world_size}"
    yield ConfigError("backend.ranks", run.backend.ranks, why=why, fix=fix)


def _refuse_family(run: Run, world_size: int) -> Iterator[ConfigError]:
    """Refuse to spread models that the strategy cannot spread, and kernels that their family does not have."""
    if not isinstance(run.job, BatchedJob | GeneratingJob):
        return
    length = run.job.sequence_length if isinstance(run.job, BatchedJob) else 0
    yield from family_refusals(run.parallel, run.model, run.attention, world_size=world_size, length=length)
    if isinstance(run.job, GeneratingJob) and run.job.engine != "transformers":
        return  # engines with kernels of their own
    config = run.model.stored_config()
    marks = attention_marks(str(config.get("model_type"))) if config is not None else None
    if marks is not None and (refusal := unsupported(run.attention, str(run.model.family()), marks)) is not None:
        yield refusal


def _refuse_long_sequences(run: Run, job: BatchedJob) -> Iterator[ConfigError]:
    shape = run.model.shape()
    if shape is not None and job.sequence_length > shape.context:
        why = f"{run.model.name} takes at most {shape.context} tokens"
        yield job.refuse("sequence_length", why, f"set job.sequence_length={shape.context}")


def _refuse_accumulation(run: Run, job: BatchedJob) -> Iterator[ConfigError]:
    own = run.parallel.accumulation
    if own is not None and job.accumulation not in (None, own):
        why = f"parallel.micro_batches={own} says how many forward passes a step takes"
        yield job.refuse("accumulation", why, "leave one of the two out")


def _refuse_split_sequences(run: Run, job: BatchedJob, world_size: int) -> Iterator[ConfigError]:
    """Refuse sequences that do not divide over their ranks."""
    degree, length = run.parallel.degrees(world_size).sequence, job.sequence_length
    if degree == 1:
        return
    if length % degree:
        why = f"it does not divide by parallel.sequence={degree}"
        yield job.refuse("sequence_length", why, f"set job.sequence_length={max(1, length // degree) * degree}")


def _refuse_vocabulary(run: Run) -> Iterator[ConfigError]:
    shape, data = run.model.shape(), run.data
    trained_here = isinstance(data, Corpus) and data.trains_tokenizer
    if shape is None or not (trained_here or isinstance(data, Synthetic)):
        return  # other tokenizers are only known once they are loaded: the rank checks them
    assert isinstance(data, Corpus | Synthetic)
    if data.vocab_size > shape.vocab_size:
        why = f"{run.model.name} has {shape.vocab_size} rows of embedding, one a token"
        yield data.refuse("vocab_size", why, f"set data.vocab_size={shape.vocab_size}")


def _refuse_too_many_ranks(hosts: Sequence[Host]) -> Iterator[ConfigError]:
    for host in hosts:
        if host.devices and host.slots > len(host.devices):
            gpus = "1 GPU" if len(host.devices) == 1 else f"{len(host.devices)} GPUs"
            fix = f"set backend.ranks={len(host.devices)}"
            yield ConfigError("backend.ranks", host.slots, why=f"{host.name} shows {gpus}, one a rank", fix=fix)


def _refuse_uneven_hosts(run: Run, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    """DeepSpeed's launcher takes the rank modulo the host's ranks for the local rank: wrong on uneven hosts."""
    if run.backend.agent != "deepspeed":
        return
    for host, first in zip(hosts, first_ranks(hosts), strict=True):
        if first % host.slots:
            why = f"it misnumbers the {host.slots} ranks of {host.name}, whose first is {first}"
            yield run.backend.refuse("agent", why, "set backend.agent=torchrun or give every host as many ranks")
            return


def _refuse_unknown_ranks(run: Run, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    world_size = sum(host.slots for host in hosts)
    if run.backend.show_ranks != "all":
        unknown = [rank for rank in run.backend.show_ranks if not 0 <= rank < world_size]
        if unknown:
            why = f"the run has ranks 0 to {world_size - 1}"
            yield ConfigError("backend.show_ranks", unknown, why=why, fix="set backend.show_ranks=all")
