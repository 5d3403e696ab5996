"""Checks of a Run against its hosts; errors name the option, the arithmetic and a fix."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from launcher.config.activation import OffloadCheckpointing
from launcher.config.adapter import Lora
from launcher.config.adapter_folder import ADAPTER_NAME
from launcher.config.attention import FlashAttention, FlexAttention
from launcher.config.backend import base
from launcher.config.compile import RegionalCompile
from launcher.config.data.auto import AutoData
from launcher.config.data.base import Corpus, Synthetic
from launcher.config.data.images import IMAGE_OPTIONS
from launcher.config.job.generating import GeneratingJob
from launcher.config.job.quantize import Quantize
from launcher.config.job.sparsify import Sparsify
from launcher.config.model.gpt2 import Gpt2
from launcher.config.model.hf import Hf
from launcher.config.model.linear_layers import ModuleSizes, module_sizes
from launcher.config.model.transformers_support import attention_support
from launcher.config.optimizer import AdamW
from launcher.config.option_text import flatten_options
from launcher.config.parallel.zero import Zero
from launcher.config.precision import FP8_MULTIPLE, Fp8Precision
from launcher.config.quantization import METHODS
from launcher.config.run import BatchedJob, Benchmark, LearningJob, Run, run_to_tree
from launcher.config.sparsity import Pruning
from launcher.config.supported_models import packing_error, unsupported_attention, validate_family
from launcher.errors import ConfigError
from launcher.errors.secrets import is_secret, is_secret_argument, is_secret_value, secret_variable_in
from launcher.protocol.plan import Host, first_ranks
from launcher.protocol.rundir import RUN_INDEX

_MAX_NAME_BYTES = 200
"""Of a folder's name; file systems allow 255."""
_WHOLE_MODEL = ("single", "ddp")
"""Strategies under which every rank holds the whole model."""

_ARGUMENTS = ("ssh_options", "sbatch_options")
"""Options of backends whose words are passed to other programs."""
_READ_BY_SHELL = re.compile(r"\w+=\"?\$[\w({]")
"""An assignment in a line of shell whose value only the shell knows."""
_WRITTEN = ("parallel.nvme_path", "job.output", "data.cache")
"""Paths that ranks write to."""
_NO_CHECKPOINTS = ("0", "false", "default")
"""Values of the group checkpoint that ask for none."""


def validate_run(run: Run, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    """Yield everything that keeps ``run`` from working on ``hosts``, except the batch equation."""
    world_size = sum(host.slots for host in hosts)
    yield from _validate_parallel_dims(run, world_size)
    yield from run.parallel.validate_run(world_size, run.precision, optimizer=run.optimizer, shape=run.model.shape())
    if isinstance(run.job, BatchedJob):
        yield from _validate_accumulation(run, run.job)
        yield from _validate_split_sequences(run, run.job, world_size)
        yield from validate_numerics(run, run.job, hosts)
        yield from run.model.validate_length(job__sequence_length=run.job.sequence_length)
        yield from _validate_vocabulary(run)
        yield from _validate_packing(run)
    yield from _validate_name(run)
    yield from _validate_family(run, world_size)
    yield from _validate_ranks_per_host(hosts)
    yield from _validate_uneven_hosts(run, hosts)
    yield from base.validate_env(run.backend.env, forward=getattr(run.backend, "forward", None))
    yield from validate_secrets(run)
    yield from _validate_shown_ranks(run, hosts)
    yield from run.backend.validate_hosts(hosts)
    yield from _validate_written_paths(run)
    yield from _validate_deploy(run)
    yield from _validate_quantization(run)
    yield from _validate_sparsity(run)
    yield from _validate_adapter(run, world_size)
    yield from _validate_parameter_groups(run)
    yield from _validate_checkpoint(run)
    yield from run.job.validate_run(run, world_size=world_size)
    yield from _validate_profile(run, world_size)


def validate_secrets(run: Run) -> Iterator[ConfigError]:
    """Reject secrets in options: run.yaml, plan.json, manifests and W&B store them unmasked."""
    for option, value in flatten_options(run_to_tree(run)):
        if name := secret_variable_in(value, os.environ):
            why = f"holds the value of the variable {name}, and run.yaml is written to disk"
            yield ConfigError(option, why=why, fix=f"leave it out: ranks on this machine have {name} of your shell")
        elif not option.startswith("backend.env.") and is_secret_value(value):
            why = "holds a secret (a password in an address, a token or a key), and run.yaml is written to disk"
            fix = "leave the secret out; export it in your shell under the name that the library reads (HF_TOKEN, …)"
            yield ConfigError(option, why=why, fix=fix)
    for name in _ARGUMENTS:
        words = getattr(run.backend, name, ())
        if any(is_secret_argument(word) and not is_secret_value(word) for word in words):
            why = "holds a secret (a password or token), and run.yaml is written to disk"
            fix = "leave it out: name a file or an agent that holds it (ssh: a key, -i FILE, or ssh-agent)"
            yield ConfigError(f"backend.{name}", why=why, fix=fix)
    for line in getattr(run.backend, "setup", ()):
        if is_secret("", _READ_BY_SHELL.sub("", line)) and not is_secret_value(line):
            why = "assigns a secret (a password or token), and run.yaml is written to disk"
            fix = "export it in your shell and name it in backend.forward, or read it from a file: NAME=$(cat FILE)"
            yield ConfigError("backend.setup", why=why, fix=fix)


def _validate_name(run: Run) -> Iterator[ConfigError]:
    """Reject a name that is a path, or none: it is one folder below ``run.root``."""
    name = run.run.name
    if not name.strip() or name in (".", "..") or "/" in name:
        last = name.rstrip("/").rpartition("/")[2]
        example = last if last.strip() not in ("", ".", "..") else "mine"
        why = "is empty" if not name.strip() else "is a path, and the name of a run is one folder below run.root"
        fix = f"set run.name={example}; run.root names the folder of all runs, run.dir that of this one"
        yield ConfigError("run.name", name, why=why, fix=fix)
    elif name == RUN_INDEX:
        why = "is the file that lists runs with directories of their own"
        yield ConfigError("run.name", name, why=why, fix="set another name")
    elif not name.isprintable() or len(name.encode()) > _MAX_NAME_BYTES:
        why = f"holds a control character, or more than {_MAX_NAME_BYTES} bytes"
        yield ConfigError("run.name", name, why=why, fix="set a shorter one of printable characters")


def _validate_written_paths(run: Run) -> Iterator[ConfigError]:
    """Reject folders on hosts that ranks write to and cannot."""
    folders = run.backend.writable_folders
    for option, path in run.paths() if folders is not None else ():
        is_written = option in _WRITTEN and option.partition(".")[0] not in run.job.unused_groups(run)
        inside = PurePosixPath(posixpath.normpath(path))
        if is_written and inside.is_absolute() and not any(map(inside.is_relative_to, folders or ())):
            why = f"is outside of the folders that ranks may write on hosts: {', '.join(folders or ())}"
            yield ConfigError(
                option, path, why=why, fix="choose a folder below one of them, or add one to backend.volumes"
            )


def _validate_deploy(run: Run) -> Iterator[ConfigError]:
    """Reject the group that has no effect on a run; ``launch deploy`` plans without it."""
    if run.deploy.kind != "none":
        why = "has no effect on a run: launch deploy renders it"
        fix = f"type launch deploy … deploy={run.deploy.kind} to write the files, or leave deploy out"
        yield ConfigError("deploy", run.deploy.kind, why=why, fix=fix)


def _validate_profile(run: Run, world_size: int) -> Iterator[ConfigError]:
    try:
        num_steps = run.job.num_steps(run, world_size=world_size)
    except ConfigError:
        return  # the batch does not come out even, which the plan refuses
    if isinstance(run.job, LearningJob) and not num_steps:
        return  # a rank counts the sequences of its epochs
    yield from run.profile.validate_steps(run.job.profile_unit, num_steps)


def validate_overrides_used(run: Run, words: Sequence[str]) -> Iterator[ConfigError]:
    """Yield each option on the command line that has no effect on the job.

    Those of an experiment may serve other jobs.

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
        elif why := _idle(run, group, option, value):
            yield ConfigError(key, value, why=why, fix=f"leave {key} out")
        elif group in groups and group != "benchmark":
            why = f"{run.job.names_itself(run)} does not use the group {group}"
            yield ConfigError(key, value, why=why, fix=f"leave {key} out")
        elif group == "checkpoint" and option != "resume" and not run.job.saves and value not in _NO_CHECKPOINTS:
            why = f"job={run.job.kind} writes no checkpoints"
            yield ConfigError(key, value, why=why, fix=f"leave {key} out")


def _idle(run: Run, group: str, option: str, value: str) -> str:
    """Return why an option has no effect with the others; empty if it has one."""
    if group == "parallel":
        return "" if value in _WHOLE_MODEL else run.job.unused_strategy(run)
    if group == "model":
        return run.job.unused_model_options(run).get(option, "")
    if group == "data" and isinstance(run.data, AutoData) and option in IMAGE_OPTIONS:
        return _takes_text_only(run)
    return run.job.unused_options(run).get(option, "") if group == "job" else ""


def _takes_text_only(run: Run) -> str:
    """Return why a run's model takes no images; empty where it does or is not here."""
    model = run.model
    is_known = not isinstance(model, Hf) or model.stored_config() is not None
    is_used = "model" not in run.job.unused_groups(run)
    return f"{model.name} takes text only" if is_used and is_known and model.image_text() is None else ""


def _validate_checkpoint(run: Run) -> Iterator[ConfigError]:
    """Reject copies of what lies on NVMe, and a checkpoint if the job does not resume.

    ``auto`` resumes any run in its own directory.
    """
    if run.checkpoint.async_mode == "async" and run.parallel.keeps_state_on_nvme:
        why = "weights or moments lie on NVMe, and host memory has no room for copies of them"
        yield ConfigError("checkpoint.async_mode", "async", why=why, fix="set checkpoint.async_mode=disabled")
    resume = run.checkpoint.resume
    if run.job.resumes or resume in ("none", "auto"):
        return
    why = f"job={run.job.kind} does not continue a training run, and would ignore the checkpoint"
    takes_weights = not isinstance(run.benchmark, Benchmark) or run.benchmark.needs_model
    fix = f"set model.weights={resume} checkpoint.resume=none" if takes_weights else "leave it out"
    yield ConfigError("checkpoint.resume", resume, why=why, fix=fix)


def _validate_quantization(run: Run) -> Iterator[ConfigError]:
    """Reject unused methods, and layers in few bits that would be trained or sliced."""
    chosen, own = run.quantization.kind, run.model.quantization
    quantizes = isinstance(run.job, Quantize)
    if chosen != "none" and not quantizes:
        why = f"job={run.job.kind} does not quantize a model"
        fix = f"set model.quantization={chosen} to quantize while loading, or job=quantize to save a quantized model"
        yield ConfigError("quantization", chosen, why=why, fix=fix)
    if own == "none":
        return
    if isinstance(run.job, Sparsify):
        why = "job=sparsify prunes weights that are not quantized"
        fix = "set model.quantization=none, and quantize what job=sparsify saves by job=quantize"
        yield ConfigError("model.quantization", own, why=why, fix=fix)
    elif quantizes:
        why = "job=quantize starts from the original weights and uses the group quantization"
        fix = f"set model.quantization=none quantization={own}"
        yield ConfigError("model.quantization", own, why=why, fix=fix)
    else:
        yield from validate_quantized_weights(run, "model.quantization", own, instead="set model.quantization=none")


def _validate_sparsity(run: Run) -> Iterator[ConfigError]:
    """Reject methods that prune nothing, and zeros to keep where no weight changes."""
    sparsity = run.sparsity
    if isinstance(sparsity, Pruning) and not isinstance(run.job, Sparsify):
        why = f"job={run.job.kind} does not prune a model"
        fix = "set job=sparsify, or sparsity=none and model.weights to a folder that job=sparsify saved"
        yield ConfigError("sparsity", sparsity.kind, why=why, fix=fix)
    if sparsity.keep and not isinstance(run.job, LearningJob):
        why = f"job={run.job.kind} trains no weights, so their zeros stay"
        yield ConfigError("sparsity.keep", "true", why=why, fix="leave it out, or set job=train")
    elif sparsity.keep:
        yield from _validate_kept_zeros(run)


def _validate_kept_zeros(run: Run) -> Iterator[ConfigError]:
    """Reject training in which zeros cannot stay, and weights that have none."""
    if run.lora is not None:
        why = f"adapter={run.adapter.kind} leaves the weights and their zeros as they are, and merged into them its "
        why += "update would fill the zeros"
        yield ConfigError("sparsity.keep", "true", why=why, fix="set adapter=none, or leave sparsity.keep out")
    if run.model.weights == "random" and run.checkpoint.resume in ("none", "auto"):
        why = "random weights have no zeros to keep"
        yield ConfigError("sparsity.keep", "true", why=why, fix="set model.weights to a folder that job=sparsify saved")
    if getattr(run.optimizer, "eps", 1.0) == 0:
        why = "the update of a weight without a gradient is 0 / 0, and sparsity.keep=true gives zeros none"
        yield run.optimizer.error("eps", why, "set optimizer.eps=1e-8")


def validate_quantized_weights(run: Run, option: str, value: object, *, instead: str) -> Iterator[ConfigError]:
    """Yield why a run cannot have quantized weights.

    Args:
        run: what is asked for.
        option: by which the weights are quantized, as the user types it.
        value: of that option.
        instead: what would work with any run.
    """
    if isinstance(run.job, BatchedJob) and run.job.trains and run.lora is None:
        why = f"job={run.job.kind} takes optimizer steps, and quantized layers cannot be trained"
        yield ConfigError(option, value, why=why, fix=f"{instead}, or adapter=qlora to train an adapter on them")
    elif isinstance(run.benchmark, Benchmark) and not run.benchmark.supports_quantized:
        why = f"benchmark={run.benchmark.kind} trains the model, quantizes it itself, or has none"
        yield ConfigError(option, value, why=why, fix=instead)
    elif run.parallel.kind not in ("single", "ddp", "pipeline"):
        why = f"parallel={run.parallel.kind} splits matrices, and quantized ones cannot be split"
        yield ConfigError(option, value, why=why, fix="set parallel=single")


def _validate_adapter(run: Run, world_size: int) -> Iterator[ConfigError]:
    """Reject layers that the model lacks, and what cannot be trained beside frozen weights."""
    lora, modules = run.lora, module_sizes(run.model)
    if run.model.adapter is not None and getattr(run.job, "engine", "") == "vllm":
        why = "vLLM loads the weights from their folder, without the adapter"
        fix = "merge them (launch export RUN DIR merge=true) and set model=hf model.name=DIR"
        yield ConfigError("model.adapter", run.model.adapter, why=why, fix=fix)
    if lora is None or "adapter" in run.job.unused_groups(run):
        return
    errors = list(lora.validate_modules(modules)) if modules is not None else []
    yield from errors
    dims = run.parallel.dims(world_size)
    if isinstance(run.precision, Fp8Precision):
        why = "the matrices of an adapter are too narrow for fp8, whose sizes are multiples of 16"
        yield ConfigError("precision", Fp8Precision.kind, why=why, fix="set precision=bf16")
    if dims.tensor > 1:
        why = "tensor parallelism slices the layers that the adapter wraps"
        yield ConfigError("parallel.tensor", dims.tensor, why=why, fix="set parallel=fsdp parallel.tensor=1")
    if run.parallel.keeps_state_on_nvme:
        why = "the weights are frozen, so nothing is left that would need a disk besides them"
        yield ConfigError("parallel", "zero_infinity", why=why, fix="set parallel=zero3_offload")
    if dims.pipeline > 1 and modules is not None and not errors:
        yield from _validate_staged_adapter(run, lora, modules)
    if run.model.quantization != "none":
        yield from validate_adapter_on_quantized(lora, run.model.quantization, option="model.quantization")


def _validate_parameter_groups(run: Run) -> Iterator[ConfigError]:
    """Reject groups of the optimizer that no trained parameter is in.

    The model's sizes decide the names.

    Plugins that transform the model may add or freeze parameters: then the ranks check.
    """
    modules = module_sizes(run.model) if run.optimizer.groups else None
    transforms: tuple[str, ...] = getattr(run.job, "transforms", ())
    if modules is None or transforms or "optimizer" in run.job.unused_groups(run):
        return
    if run.lora is None:
        yield from run.optimizer.validate_groups(modules.parameter_names)
    elif not list(run.lora.validate_modules(modules)):
        yield from run.optimizer.validate_groups(run.lora.trained_names(modules, adapter=ADAPTER_NAME))


def _validate_staged_adapter(run: Run, lora: Lora, modules: ModuleSizes) -> Iterator[ConfigError]:
    """Reject stages of a pipeline on which nothing would be trained."""
    blocks = {block for name in modules.linear if (block := _block_of(name))}
    trained = {block for name in lora.target_names(modules.linear) if (block := _block_of(name))}
    if left := sorted(blocks - trained):
        why = f"parallel={run.parallel.kind} trains on every stage, and {left[0]} has none of these layers"
        yield lora.error("targets", why, "choose layers of every block, or set parallel=fsdp")


def _block_of(name: str) -> str:
    """Return the name of the block that a layer is in: up to the number."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def validate_adapter_on_quantized(lora: Lora, kind: str, *, option: str) -> Iterator[ConfigError]:
    """Yield why an adapter cannot be trained on weights that are quantized in this way.

    Args:
        lora: the adapter.
        kind: of the quantization.
        option: by which the weights are quantized.
    """
    if not METHODS[kind].is_differentiable:
        why = "it rounds the inputs of layers, so no gradient passes through them"
        yield ConfigError(option, kind, why=why, fix="set model.quantization=nf4 or int8_weight")
    if lora.is_dora:
        why = "DoRA divides by the lengths of the weights at every step, and quantized weights have none to read"
        yield ConfigError("adapter", lora.kind, why=why, fix="set adapter=qlora, or model.quantization=none")


def _validate_parallel_dims(run: Run, world_size: int) -> Iterator[ConfigError]:
    """Reject a world that the degrees do not divide, naming each of them."""
    fits = run.parallel.dims(world_size)
    if fits.product == world_size:
        return
    unit = run.parallel.dims(1).product
    nearest = sorted({max(unit, world_size // unit * unit), (world_size // unit + 1) * unit})
    fix = f"run on {' or '.join(map(str, nearest))} ranks (backend.ranks counts those of one host)"
    if run.parallel.degree_options:
        fix += f", or change {', '.join(f'parallel.{name}' for name in run.parallel.degree_options)}"
    why = f"{fits} does not match the {world_size} ranks of the run"
    yield ConfigError("backend.ranks", run.backend.ranks, why=why, fix=fix)


def _validate_family(run: Run, world_size: int) -> Iterator[ConfigError]:
    """Reject strategies that cannot split the model, and kernels that its family does not have."""
    if not isinstance(run.job, BatchedJob | GeneratingJob):
        return
    length = run.job.sequence_length if isinstance(run.job, BatchedJob) else 0
    yield from validate_family(run.parallel, run.model, run.attention, world_size=world_size, length=length)
    if isinstance(run.job, GeneratingJob) and run.job.engine != "transformers":
        return  # engines with kernels of their own
    config = run.model.stored_config()
    marks = attention_support(str(config.get("model_type"))) if config is not None else None
    if (
        marks is not None
        and (error := unsupported_attention(run.attention, str(run.model.family()), marks)) is not None
    ):
        yield error


def _validate_packing(run: Run) -> Iterator[ConfigError]:
    """Reject rows of several examples where these would see each other."""
    if getattr(run.data, "packing", None) and (error := packing_error(run.model, run.attention)) is not None:
        yield error


def _validate_accumulation(run: Run, job: BatchedJob) -> Iterator[ConfigError]:
    own = run.parallel.gradient_accumulation_steps
    if own is not None and job.gradient_accumulation_steps not in (None, own):
        why = f"parallel.micro_batches={own} sets the number of forward passes of a step"
        yield job.error("gradient_accumulation_steps", why, "leave one of the two out")


def _validate_split_sequences(run: Run, job: BatchedJob, world_size: int) -> Iterator[ConfigError]:
    """Reject sequences that do not divide over their ranks."""
    degree, length = run.parallel.dims(world_size).sequence, job.sequence_length
    if degree == 1:
        return
    if length % degree:
        why = f"it does not divide by parallel.sequence_parallel={degree}"
        yield job.error("sequence_length", why, f"set job.sequence_length={max(1, length // degree) * degree}")


def _validate_vocabulary(run: Run) -> Iterator[ConfigError]:
    shape, data = run.model.shape(), run.data
    trained_here = isinstance(data, Corpus) and data.trains_tokenizer
    if shape is None or not (trained_here or isinstance(data, Synthetic)):
        return  # other tokenizers are only known once they are loaded: the rank checks them
    assert isinstance(data, Corpus | Synthetic)
    if data.vocab_size > shape.vocab_size:
        why = f"{run.model.name} has {shape.vocab_size} embedding rows, one per token"
        yield data.error("vocab_size", why, f"set data.vocab_size={shape.vocab_size}")


def _validate_ranks_per_host(hosts: Sequence[Host]) -> Iterator[ConfigError]:
    for host in hosts:
        if host.devices and host.slots > len(host.devices):
            gpus = "1 GPU" if len(host.devices) == 1 else f"{len(host.devices)} GPUs"
            fix = f"set backend.ranks={len(host.devices)}"
            yield ConfigError("backend.ranks", host.slots, why=f"{host.name} has {gpus}, one per rank", fix=fix)


def _validate_uneven_hosts(run: Run, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    """Reject uneven hosts under DeepSpeed's launcher, whose local ranks would be wrong.

    It computes the local rank as the rank modulo the host's ranks.
    """
    if run.backend.agent != "deepspeed":
        return
    for host, first in zip(hosts, first_ranks(hosts), strict=True):
        if first % host.slots:
            why = f"it misnumbers the {host.slots} ranks of {host.name}, whose first is {first}"
            yield run.backend.error("agent", why, "set backend.agent=torchrun or give every host as many ranks")
            return


def _validate_shown_ranks(run: Run, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    world_size = sum(host.slots for host in hosts)
    if run.backend.show_ranks != "all":
        unknown = [rank for rank in run.backend.show_ranks if not 0 <= rank < world_size]
        if unknown:
            why = f"the run has ranks 0 to {world_size - 1}"
            yield ConfigError("backend.show_ranks", unknown, why=why, fix="set backend.show_ranks=all")


def validate_numerics(run: Run, job: BatchedJob, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    """Yield formats that these hosts do not support.

    On hosts that were not probed the ranks check.
    """
    without_gpu = next((host.name for host in hosts if host.is_probed and not host.devices), None)
    yield from _validate_formats(run, without_gpu)
    if isinstance(run.precision, Fp8Precision):
        yield from _validate_fp8(run, job)
    yield from _validate_kernels(run, without_gpu, on_gpu=any(host.devices for host in hosts))
    if isinstance(run.compile, RegionalCompile):
        yield from _validate_compilation(run)
    yield from _validate_optimizer(run, job, world_size=sum(host.slots for host in hosts))


def _validate_optimizer(run: Run, job: BatchedJob, *, world_size: int) -> Iterator[ConfigError]:
    """Reject an optimizer that the strategy cannot build, shard or save."""
    optimizer, parallel = run.optimizer, run.parallel
    if not isinstance(optimizer, AdamW):
        if not job.trains:
            return
        if parallel.engine == "deepspeed":
            why = f"parallel={parallel.kind} supports AdamW only: {optimizer.why_not_flat}"
            fix = "set optimizer=adamw, parallel=ddp or parallel=fsdp"
            yield ConfigError("optimizer", optimizer.kind, why=why, fix=fix)
        elif parallel.dims(world_size).shards_parameters and not optimizer.saves_shards:
            why = f"parallel={parallel.kind} shards parameters: {optimizer.why_not_sharded}"
            yield ConfigError("optimizer", optimizer.kind, why=why, fix="set optimizer=adamw or parallel=ddp")
        elif parallel.kind == "pipeline" and not optimizer.trains_pipelines:
            why = "its class lists no state_names, which pipelines need to save the state"
            yield ConfigError("optimizer", optimizer.kind, why=why, fix="set parallel=ddp")
    elif optimizer.implementation == "native" and run.parallel.engine != "deepspeed":
        why = "it is DeepSpeed's, and this strategy runs without DeepSpeed"
        yield optimizer.error("implementation", why, "set optimizer.implementation=torch, which is fused too")


def _validate_formats(run: Run, without_gpu: str | None) -> Iterator[ConfigError]:
    if run.precision.min_compute_capability is not None and without_gpu is not None:
        why = f"only GPUs support this format, and {without_gpu} has none"
        yield ConfigError("precision", run.precision.kind, why=why, fix=f"set precision={run.precision.compute}")


def _validate_fp8(run: Run, job: BatchedJob) -> Iterator[ConfigError]:
    if run.parallel.engine == "deepspeed":
        why = "DeepSpeed itself casts the weights to 16 bits, which torchao's fp8 layers do not support"
        yield ConfigError("precision", Fp8Precision.kind, why=why, fix="set parallel=ddp or precision=bf16")
    if _is_gpt2(run):
        why = "GPT-2's layers are Conv1D, and torchao converts torch.nn.Linear only"
        yield ConfigError("precision", Fp8Precision.kind, why=why, fix="set precision=bf16 or another model")
    tokens = job.micro_batch * job.sequence_length
    if tokens % FP8_MULTIPLE:
        product = f"{job.micro_batch} × {job.sequence_length} = {tokens} tokens"
        why = f"a micro-batch of {product} is not a multiple of {FP8_MULTIPLE}, which fp8 needs"
        better = max(FP8_MULTIPLE, job.sequence_length // FP8_MULTIPLE * FP8_MULTIPLE)
        yield ConfigError("precision", Fp8Precision.kind, why=why, fix=f"set job.sequence_length={better}")


def _validate_kernels(run: Run, without_gpu: str | None, *, on_gpu: bool) -> Iterator[ConfigError]:
    attention = run.attention
    if isinstance(attention, FlexAttention):
        if _is_gpt2(run):
            why = "Transformers has no flex attention for GPT-2"
            yield ConfigError("attention", attention.kind, why=why, fix="set attention=sdpa or another model")
        if without_gpu is not None:
            why = f"it has no backward pass on a CPU, and {without_gpu} has no GPU"
            yield ConfigError("attention", attention.kind, why=why, fix="set attention=sdpa")
    if isinstance(attention, FlashAttention):
        if on_gpu and run.precision.compute == "fp32":
            why = f"on a GPU the flash kernel supports 16-bit formats only, and precision is {run.precision.kind}"
            yield ConfigError("attention", attention.kind, why=why, fix="set precision=bf16 or attention=sdpa")
        if without_gpu is not None and isinstance(run.model, Gpt2) and run.model.dropout:
            why = f"on a CPU the flash kernel has no dropout, and model.dropout={run.model.dropout:g}"
            yield ConfigError("attention", attention.kind, why=why, fix="set model.dropout=0 or attention=sdpa")


def _validate_compilation(run: Run) -> Iterator[ConfigError]:
    if isinstance(run.activation, OffloadCheckpointing):
        why = "torch.compile does not support the copies of activation=offload"
        yield ConfigError("compile", run.compile.kind, why=why, fix="set activation=full or compile=false")
    if isinstance(run.parallel, Zero) and run.parallel.stage == 3:
        why = "ZeRO-3 gathers weights inside each block, which torch cannot compile"
        yield ConfigError("compile", run.compile.kind, why=why, fix="set parallel=zero2 or compile=false")


def _is_gpt2(run: Run) -> bool:
    return run.model.architecture().get("family") == Gpt2.kind
