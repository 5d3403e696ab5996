"""Refusals of number formats, kernels and compilation where the model, the engine or the hosts rule them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launcher.activation import Offload
from launcher.attention import Flash, Flex
from launcher.compile import CompiledBlocks
from launcher.config import Run
from launcher.errors import ConfigError
from launcher.jobs.base import BatchedJob
from launcher.models.gpt2 import Gpt2
from launcher.parallel.zero import Zero
from launcher.plan import Host
from launcher.precision import FP8_MULTIPLE, Fp8


def refusals(run: Run, job: BatchedJob, hosts: Sequence[Host]) -> Iterator[ConfigError]:
    """Yield what cannot be computed as asked; on hosts that nobody has looked at yet, the ranks find out."""
    without_gpu = next((host.name for host in hosts if host.is_known and not host.devices), None)
    yield from _refuse_formats(run, without_gpu)
    if isinstance(run.precision, Fp8):
        yield from _refuse_fp8(run, job)
    yield from _refuse_kernels(run, without_gpu, on_gpu=any(host.devices for host in hosts))
    if isinstance(run.compile, CompiledBlocks):
        yield from _refuse_compilation(run)
    if run.optimizer.implementation == "native" and run.parallel.engine != "deepspeed":
        why = "it is DeepSpeed's, and this strategy runs without DeepSpeed"
        yield run.optimizer.refuse("implementation", why, "set optimizer.implementation=torch, which is fused too")


def notes(run: Run, hosts: Sequence[Host]) -> Iterator[str]:
    """Yield what a user should know of options that work."""
    if isinstance(run.activation, Offload) and any(host.is_known and not host.devices for host in hosts):
        yield "activation=offload moves nothing without a GPU: activations are in host RAM already, as activation=full"


def _refuse_formats(run: Run, without_gpu: str | None) -> Iterator[ConfigError]:
    if run.precision.needs_capability is not None and without_gpu is not None:
        why = f"only GPUs multiply in this format, and {without_gpu} has none"
        yield ConfigError("precision", run.precision.kind, why=why, fix=f"set precision={run.precision.compute}")


def _refuse_fp8(run: Run, job: BatchedJob) -> Iterator[ConfigError]:
    if run.parallel.engine == "deepspeed":
        why = "DeepSpeed casts the weights to 16 bits by itself, beneath torchao's layers"
        yield ConfigError("precision", Fp8.kind, why=why, fix="set parallel=ddp or precision=bf16")
    if _is_gpt2(run):
        why = "GPT-2's layers are Conv1D, and torchao converts torch.nn.Linear only"
        yield ConfigError("precision", Fp8.kind, why=why, fix="set precision=bf16 or another model")
    tokens = job.micro_batch * job.sequence_length
    if tokens % FP8_MULTIPLE:
        product = f"{job.micro_batch} × {job.sequence_length} = {tokens} tokens"
        why = f"a micro-batch of {product} is not a multiple of {FP8_MULTIPLE}, as 8-bit products need"
        better = max(FP8_MULTIPLE, job.sequence_length // FP8_MULTIPLE * FP8_MULTIPLE)
        yield ConfigError("precision", Fp8.kind, why=why, fix=f"set job.sequence_length={better}")


def _refuse_kernels(run: Run, without_gpu: str | None, *, on_gpu: bool) -> Iterator[ConfigError]:
    attention = run.attention
    if isinstance(attention, Flex):
        if _is_gpt2(run):
            why = "Transformers has no flex attention for GPT-2"
            yield ConfigError("attention", attention.kind, why=why, fix="set attention=sdpa or another model")
        if without_gpu is not None:
            why = f"it has no backward pass on a CPU, and {without_gpu} has no GPU"
            yield ConfigError("attention", attention.kind, why=why, fix="set attention=sdpa")
    if isinstance(attention, Flash):
        if on_gpu and run.precision.compute == "fp32":
            why = f"on a GPU the flash kernel takes 16-bit numbers only, and precision is {run.precision.kind}"
            yield ConfigError("attention", attention.kind, why=why, fix="set precision=bf16 or attention=sdpa")
        if without_gpu is not None and isinstance(run.model, Gpt2) and run.model.dropout:
            why = f"on a CPU the flash kernel has no dropout, and model.dropout={run.model.dropout:g}"
            yield ConfigError("attention", attention.kind, why=why, fix="set model.dropout=0 or attention=sdpa")


def _refuse_compilation(run: Run) -> Iterator[ConfigError]:
    if isinstance(run.activation, Offload):
        why = "torch cannot compile the copies of activation=offload"
        yield ConfigError("compile", run.compile.kind, why=why, fix="set activation=full or compile=false")
    if isinstance(run.parallel, Zero) and run.parallel.stage == 3:
        why = "ZeRO-3 gathers weights inside of each block, which torch cannot compile"
        yield ConfigError("compile", run.compile.kind, why=why, fix="set parallel=zero2 or compile=false")


def _is_gpt2(run: Run) -> bool:
    return run.model.architecture().get("family") == Gpt2.kind
