"""Warnings about options that work, but perhaps not as intended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.config.activation import OffloadCheckpointing
from launcher.config.data.base import CHECKPOINT_TOKENIZER, Corpus, Synthetic
from launcher.config.job.generating import GeneratingJob
from launcher.config.model.base import VOCABULARY_FILES, Model, has_tokenizer
from launcher.config.model.hf import Hf
from launcher.config.run import BatchedJob, LearningJob, Run
from launcher.errors import ConfigError
from launcher.protocol.plan import Host, MemoryEstimate, host_ram
from launcher.utils.hub import cached_folder
from launcher.utils.text import bytes_text


def warnings_of_run(run: Run, hosts: Sequence[Host], memory: MemoryEstimate | None) -> Iterator[str]:
    """Yield each warning as one sentence that names the option to change."""
    if isinstance(run.job, BatchedJob):
        yield from _memory_warnings(run.model, hosts, memory)
        yield from run.parallel.warnings(
            run.precision, on_gpu=all(host.devices or not host.is_probed for host in hosts)
        )
        yield from numerics_warnings(run, hosts)
        yield from _processor_warnings(run, hosts)
        yield from _schedule_warnings(run, world_size=sum(host.slots for host in hosts))
        yield from _pretrained_weights_warnings(run)
    if isinstance(run.job, GeneratingJob):
        yield from _memory_warnings(run.model, hosts, memory)
        yield from _format_warnings(run, [host for host in hosts if host.is_probed and not host.devices])
    yield from _tokenizer_warnings(run)
    yield from run.job.warnings(run, world_size=sum(host.slots for host in hosts))


def _memory_warnings(model: Model, hosts: Sequence[Host], memory: MemoryEstimate | None) -> Iterator[str]:
    if memory is None:
        yield f"{_why_sizes_are_unknown(model)}, so memory was not checked"
        return
    state = memory.per_rank
    for host in hosts:
        needed = host_ram(host, state) + host.slots * memory.checkpoint_copies
        if 0 < host.memory_bytes < needed and memory.checkpoint_copies and host_ram(host, state) < host.memory_bytes:
            yield (
                f"model state and its copies for checkpoints need {bytes_text(needed)} of RAM on {host.name}, which "
                f"has {bytes_text(host.memory_bytes)}: checkpoint.async_mode=disabled needs no copies"
            )
            return
        if 0 < host.memory_bytes < needed:
            yield (
                f"model state alone needs {bytes_text(needed)} of RAM on {host.name}, which has "
                f"{bytes_text(host.memory_bytes)}: parallel=zero_infinity keeps it on a disk"
            )
            return
        if 0 < host.device_bytes < state.device:
            yield (
                f"model state alone needs {bytes_text(state.device)} of each GPU of {host.name}, which has "
                f"{bytes_text(host.device_bytes)}: use a higher ZeRO stage, offload, or more GPUs"
            )
            return


def _why_sizes_are_unknown(model: Model) -> str:
    if not isinstance(model, Hf) or model.stored_config() is None:
        return "the model's sizes are known only once its files are downloaded"
    if model.weights == "random":
        return f"the sizes of {model.family()} models are read from weights, and model.weights=random reads none"
    if model.local_weights is None:
        return "the model's sizes are known only once its weights are downloaded"
    return f"the sizes of {model.family()} models are not known from these files"


def _processor_warnings(run: Run, hosts: Sequence[Host]) -> Iterator[str]:
    on_cpu = [host for host in hosts if host.is_probed and not host.devices]
    if not on_cpu:
        return
    crowded = next((host for host in on_cpu if host.slots > host.cores), None)
    if crowded is not None:
        yield f"{crowded.slots} ranks share {crowded.cores} cores of {crowded.name}: set backend.ranks={crowded.cores}"
    yield from _format_warnings(run, on_cpu)


def _format_warnings(run: Run, on_cpu: Sequence[Host]) -> Iterator[str]:
    if not on_cpu:
        return
    better = "bf16" if all(host.computes_bf16 for host in on_cpu) else "fp32"
    if run.precision.compute == "fp16":
        yield f"fp16 is slow without a GPU, and most CPUs compute it in fp32: precision={better} is faster here"
    if run.precision.compute == "bf16" and better == "fp32" and not run.job.uses_bf16_kernels:
        yield "this processor has no bfloat16 instructions and is many times slower without them: precision=fp32"


_FINE_TUNING_LR = 2e-4
"""Learning rate above which AdamW on all weights destroys pretrained ones.
SmolLM2 and Llama were tuned at 1e-5 to 1e-4."""


def _tokenizer_warnings(run: Run) -> Iterator[str]:
    """Yield warnings about tokenizers that the given weights were not trained with."""
    job, chosen = run.job, getattr(run.job, "tokenizer", None)
    if run.model.weights == "random" or (isinstance(job, GeneratingJob) and job.engine == "echo"):
        return
    choices = {} if chosen is None else {"job.tokenizer": chosen}
    if isinstance(run.data, Corpus) and (isinstance(job, BatchedJob) or chosen == "data"):
        choices = {**choices, "data.tokenizer": run.data.tokenizer}
    for option, choice in choices.items():
        if choice != "data" and not _knows_tokenizer(run.model, choice, option):
            owns = run.model.has_own_tokenizer
            fix = f"set {option}=model" if owns else "name the one that they were trained with"
            yield (
                f"{option}={choice}: the weights of {run.model.name} were trained with the token ids of their own "
                f"tokenizer alone: {fix}"
            )


def _knows_tokenizer(model: Model, choice: str, option: str) -> bool:
    """Return whether the weights were trained with a tokenizer.

    Only files on this machine are compared.
    """
    if choice in ("model", CHECKPOINT_TOKENIZER):
        return True
    if choice == "bytes":
        return not model.has_own_tokenizer  # then it is the only choice
    folder = Path(choice).expanduser()
    if option == "job.tokenizer" and not has_tokenizer(folder):
        return True  # reported elsewhere, or on a machine that this one cannot see
    try:
        source = model.tokenizer_source()
    except ConfigError:
        return False
    own = cached_folder(source) if isinstance(source, str) else source
    if choice == source or own is None:
        return choice == source
    contents = [_content(place / VOCABULARY_FILES[0]) for place in (folder, own)]
    return contents[0] is not None and contents[0] == contents[1]


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _pretrained_weights_warnings(run: Run) -> Iterator[str]:
    """Yield warnings about data and a learning rate that suit random weights only."""
    if run.job.saves and run.lora is not None and run.model.weights == "random":
        yield f"adapter={run.lora.kind} trains beside random weights, which stay as they are: set model.weights"
    if run.model.weights == "random":
        return
    if isinstance(run.data, Synthetic) and run.model.has_own_tokenizer:
        yield f"data=synthetic: its tokens mean nothing to the weights of {run.model.name}: set model.weights=random"
    if isinstance(run.job, LearningJob) and run.lora is None and run.optimizer.lr > _FINE_TUNING_LR:
        yield (
            f"optimizer.lr={run.optimizer.lr:g} is a learning rate for random weights, "
            f"and the run has those of {run.model.name}: set optimizer.lr=2e-5 to fine-tune"
        )


def _schedule_warnings(run: Run, *, world_size: int) -> Iterator[str]:
    job, schedule = run.job, run.schedule
    if not isinstance(job, LearningJob):
        return
    steps = job.num_steps(run, world_size=world_size)
    if not steps:
        return  # a rank counts the sequences of its epochs
    if schedule.num_warmup_steps(steps) >= steps:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} is not below job.steps={steps}: "
            "the learning rate never reaches optimizer.lr"
        )
    checkpoint = run.checkpoint
    if job.saves and checkpoint.every > steps and not checkpoint.at_end:
        yield f"checkpoint.every={checkpoint.every} is above job.steps={steps}: no checkpoint will be written"


def numerics_warnings(run: Run, hosts: Sequence[Host]) -> Iterator[str]:
    """Yield warnings about precision, attention, compilation and other numerics."""
    if isinstance(run.activation, OffloadCheckpointing) and any(host.is_probed and not host.devices for host in hosts):
        yield "activation=offload moves nothing without a GPU: activations are in host RAM already, as activation=full"
