"""``make_plan``: a pure function from a run and its hosts to the plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from launcher.config.adapter_folder import LORA_BYTES
from launcher.config.job.generating import GeneratingJob
from launcher.config.model.linear_layers import module_sizes
from launcher.config.model.shape import Shape
from launcher.config.option_text import component_text
from launcher.config.quantization import method_named
from launcher.config.run import Run
from launcher.config.validate import validate_run
from launcher.errors import ConfigError, ConfigErrors
from launcher.planning.commands import RANK_LAUNCHERS, HostPosition, rank_environment
from launcher.planning.topology import rank_places
from launcher.planning.warnings import warnings_of_run
from launcher.plugins.loading import loaded_plugins
from launcher.protocol.plan import (
    Batch,
    Command,
    Host,
    HostPlan,
    MemoryEstimate,
    Plan,
    PlanSummary,
    RunIdentity,
    StateBytes,
    TrackerPlan,
    Work,
    first_ranks,
    host_ram,
)
from launcher.utils.files import home_folder
from launcher.utils.text import counted

GRACE_S, SAVE_GRACE_S = 7.0, 30.0
"""Default of ``backend.grace_s``, and of jobs that save after SIGTERM.
Kubernetes and Slurm (KillWait) give as long as the second by default."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LocalFacts:
    """Facts about this machine that a plan depends on: environment, home, native ops."""

    environ: Mapping[str, str] = field(repr=False)
    """Environment that ranks and trackers inherit, secrets included.
    A plan gets only what a tracker derives."""
    home: Path
    """The user's home, where trackers keep credentials."""
    ops_folder: str = ""
    """Folder of DeepSpeed's native operators for this environment; empty if none is needed."""
    missing_ops: tuple[str, ...] = ()
    """Arguments of ``python -m launcher.ops`` for the native ops that are not built yet."""


def make_plan(run: Run, hosts: Sequence[Host], identity: RunIdentity, facts: LocalFacts) -> Plan:
    """Return the plan of ``run`` on ``hosts``.

    Args:
        run: the typed configuration.
        hosts: where ranks go, in the order of ranks.
        identity: id, directory, hash and port of this run.
        facts: of the machine that plans.

    Raises:
        ConfigErrors: every reason why the run cannot work there.
    """
    world_size = sum(host.slots for host in hosts)
    mistakes = list(validate_run(run, hosts))
    batch = _collected(lambda: run.job.batch(run, world_size=world_size), mistakes)
    if batch is not None:
        mistakes += run.parallel.validate_batch(batch)
    tracker = _collected(lambda: _tracker(run, identity, facts), mistakes)
    if tracker is None or mistakes:
        raise ConfigErrors(mistakes)
    there = replace(identity, run_dir=run.backend.run_dir_on_hosts(identity.run_dir))
    memory = estimate_memory(run, hosts) if batch is not None or isinstance(run.job, GeneratingJob) else None
    if mistakes := list(run.backend.validate_memory(hosts, memory)):
        raise ConfigErrors(mistakes)
    hosts = run.backend.sized_hosts(hosts, memory)
    return Plan(
        run_id=identity.run_id,
        name=run.run.name,
        run_dir=identity.run_dir,
        run_dir_on_hosts="" if there == identity else there.run_dir,
        run_hash=identity.run_hash,
        job=run.job.kind,
        backend=run.backend.kind,
        world_size=world_size,
        topology=run.parallel.dims(world_size).named(),
        summary=_summary(run, batch),
        details={
            **dict(run.job.describe(run, world_size=world_size)),
            **dict(run.profile.describe(run.job.profile_unit)),
            **_describe_adapter(run),
            **_describe_plugins(run),
        },
        port=identity.port,
        ranks=tuple(rank_places(hosts)),
        hosts=tuple(_host_plans(run, hosts, there, facts, tracker)),
        work=_work(run, batch, world_size=world_size),
        memory=memory,
        engine_config=_engine_config(run, batch),
        tracker=tracker,
        files=tuple(_files(run, hosts, tracker)),
        stall_timeout_s=run.backend.stall_timeout_s,
        handles_preemption=run.job.handles_preemption,
        completes_on_signal=run.job.completes_on_signal,
        grace_s=_grace_s(run, default=SAVE_GRACE_S if run.job.handles_preemption else GRACE_S),
        preempt_grace_s=max(run.backend.preempt_grace_s, run.job.shutdown_grace_s),
        interrupt_grace_s=_grace_s(run, default=GRACE_S),
        heartbeat_timeout_s=run.backend.heartbeat_timeout_s,
        forwarded_env=run.backend.forwards(facts.environ),
        show_ranks=None if run.backend.show_ranks == "all" else run.backend.show_ranks,
        warnings=tuple(warnings_of_run(run, hosts, memory)),
    )


def _grace_s(run: Run, *, default: float) -> float:
    """Return the seconds between a signal to the ranks and SIGKILL."""
    chosen = default if run.backend.grace_s is None else run.backend.grace_s
    return max(chosen, run.job.shutdown_grace_s)


def gather_local_facts(run: Run, *, run_dir: str) -> LocalFacts:
    """Return the facts of this machine for a run in ``run_dir``."""
    environ, home = dict(os.environ), home_folder()
    if "deepspeed" not in (run.parallel.engine, run.backend.agent):
        return LocalFacts(environ=environ, home=home)
    from launcher.protocol.native_ops import (  # reads package versions, which is slow
        ops_arguments,
        ops_folder,
        ops_to_build,
    )

    ops = run.parallel.native_ops(run.optimizer)
    # other machines are not inspected: their build command finds what is missing
    is_elsewhere = run.backend.probes_hosts or not run.backend.sees_files_of_hosts(run_dir)
    missing_ops = ops_arguments(ops) if is_elsewhere else ops_to_build(ops)
    return LocalFacts(environ=environ, home=home, ops_folder=str(ops_folder()), missing_ops=missing_ops)


def _collected(make: Callable[[], T], mistakes: list[ConfigError]) -> T | None:
    """Return the result of ``make``; collect its errors, so that all are reported together."""
    try:
        return make()
    except ConfigErrors as several:
        mistakes += several.errors
    except ConfigError as error:
        mistakes.append(error)
    return None


def _work(run: Run, batch: Batch | None, *, world_size: int) -> Work:
    steps = run.job.num_steps(run, world_size=world_size)
    sequences = None if batch is None else run.batched_job.num_sequences(run, world_size=world_size)
    if batch is None or sequences is None:
        return Work(batch=None, num_steps=steps, tokens_per_step=0, total_tokens=0)
    length = run.batched_job.sequence_length
    return Work(
        batch=batch, num_steps=steps, tokens_per_step=batch.global_batch * length, total_tokens=sequences * length
    )


def _engine_config(run: Run, batch: Batch | None) -> dict[str, Any] | None:
    if batch is None:
        return None
    return run.parallel.engine_config(
        batch=batch, clip_norm=run.batched_job.clip_norm, optimizer=run.optimizer, precision=run.precision
    )


def _tracker(run: Run, identity: RunIdentity, facts: LocalFacts) -> TrackerPlan:
    planned = run.tracker.plan(identity.run_id, environ=facts.environ, home=facts.home, run_name=run.run.name)
    there = Path(run.backend.run_dir_on_hosts(identity.run_dir))
    root = there.parent if run.run.dir is not None else there.parent.parent
    return run.tracker.locate(planned, run_dir=str(there), root=str(root))


def _summary(run: Run, batch: Batch | None) -> PlanSummary:
    if isinstance(run.job, GeneratingJob):  # uses a model, but neither training data nor checkpoints
        return PlanSummary(
            model=component_text(run.model),
            strategy=component_text(run.parallel) if run.job.is_model_parallel(run) else "",
            engine=run.job.engine,
            precision=component_text(run.precision),
            attention=component_text(run.attention),
            compile=component_text(run.compile),
        )
    if batch is None:  # the other groups do not affect the measurement
        return PlanSummary(benchmark=component_text(run.benchmark), engine=run.parallel.engine)
    return PlanSummary(
        model=component_text(run.model),
        data=component_text(run.data),
        strategy=component_text(run.parallel),
        engine=run.parallel.engine,
        precision=component_text(run.precision),
        optimizer=component_text(run.optimizer) if run.batched_job.trains else "",
        schedule=component_text(run.schedule) if run.batched_job.trains else "",
        activation=component_text(run.activation),
        attention=component_text(run.attention),
        compile=component_text(run.compile),
        checkpoint=component_text(run.checkpoint) if run.job.saves else f"resume={run.checkpoint.resume}",
    )


def _host_plans(
    run: Run, hosts: Sequence[Host], identity: RunIdentity, facts: LocalFacts, tracker: TrackerPlan
) -> Iterator[HostPlan]:
    commands = RANK_LAUNCHERS[run.backend.rank_launcher](hosts, identity)
    for number, (host, first, argv) in enumerate(zip(hosts, first_ranks(hosts), commands, strict=True)):
        place = HostPosition(host=host, number=number, num_hosts=len(hosts))
        env = rank_environment(run, place, identity, ops_folder=facts.ops_folder, inherited=facts.environ)
        yield HostPlan(
            host=host,
            first_rank=first,
            build_commands=tuple(_build_commands(host, facts, env)),
            agent_command=Command(argv=argv, env=env),
            sidecars=tuple(_sidecars(host, identity, tracker)) if number == 0 else (),
        )


def _build_commands(host: Host, facts: LocalFacts, env: Mapping[str, str]) -> Iterator[Command]:
    """Yield the command that builds DeepSpeed's missing native ops.

    It builds them for the device that the ranks use, in the folder that they load from.
    """
    if facts.missing_ops:
        needed = {name: env[name] for name in ("DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR") if name in env}
        yield Command(argv=(host.python, "-m", "launcher.ops", *facts.missing_ops), env=needed)


def _sidecars(host: Host, identity: RunIdentity, tracker: TrackerPlan) -> Iterator[Command]:
    """Yield the processes that send metrics.jsonl to trackers, one for each."""
    for each in tracker.processes:
        yield Command(argv=(host.python, "-m", "launcher.trackers.sidecar", identity.run_dir, each.kind))


def _describe_adapter(run: Run) -> dict[str, str]:
    """Return the line that says how many parameters are trained, and of which layers."""
    lora, shape = run.lora, run.model.shape()
    if lora is None or "adapter" in run.job.unused_groups(run):
        return {"adapter": run.model.adapter} if run.model.adapter is not None else {}
    return {"adapter": lora.describe(module_sizes(run.model), num_params=None if shape is None else shape.num_params)}


def _describe_plugins(run: Run) -> dict[str, str]:
    """Return the line of the plugins that a run uses; none without them."""
    used = [plugin for plugin in loaded_plugins() if plugin.module in run.plugins]
    return {"plugins": ", ".join(f"{plugin.name} ({plugin.file})" for plugin in used)} if used else {}


def _files(run: Run, hosts: Sequence[Host], tracker: TrackerPlan) -> Iterator[str]:
    """Yield the files that the run writes, relative to its directory."""
    yield from ("run.yaml", "plan.json", "metrics.jsonl", "result.json", *run.job.files())
    yield "failure.json (if a rank fails)"
    yield f"logs/<host>.<rank>.log, {counted(sum(host.slots for host in hosts), 'rank')}"
    if run.profile.kind == "true":
        yield "profile/<process>: .trace.json.gz .operators.txt .operators.md .memory.json (.memory.pickle on a GPU)"
    if run.job.saves and (run.checkpoint.every or run.checkpoint.at_end):
        yield "checkpoints/step_<n>/"
    yield from (
        f"{each.kind}/" for each in tracker.processes if each.kind in ("wandb", "mlflow", "tensorboard", "prometheus")
    )


def estimate_memory(run: Run, hosts: Sequence[Host]) -> MemoryEstimate | None:
    """Return the memory of the model state, by formula.

    ``None`` when the sizes of the model are known only after its download.
    """
    shape = run.model.shape()
    if shape is None:
        return None
    world_size = sum(host.slots for host in hosts)
    if isinstance(run.job, GeneratingJob):
        return _weights_alone(run, run.job, shape, hosts)
    moments = run.optimizer.moments(shape)
    state = run.parallel.state_bytes(shape, world_size, run.precision, moments=moments)
    formula = run.parallel.state_formula(world_size, run.precision, moments=moments)
    num_trained = _num_trained(run, shape)
    if num_trained != shape.num_params:
        state = _adapter_state(run, shape, num_trained, world_size)
        formula = f"frozen weights, and of the {num_trained:,} trained parameters: {formula}"
    if not run.batched_job.trains and run.parallel.engine == "torch":
        host = min(state.host, state.parameters)
        state = replace(state, gradients=0, optimizer=0, host=host)
        formula = f"only the weights, because nothing is trained: {formula}"
    copies = _checkpoint_copies(run, shape, num_trained, world_size)
    return MemoryEstimate(
        num_params=shape.num_params,
        per_rank=state,
        per_host_ram=max(host_ram(host, state) + host.slots * copies for host in hosts),
        per_host_nvme=max(host.slots * state.nvme for host in hosts),
        formula=formula,
        checkpoint_copies=copies,
    )


def _num_trained(run: Run, shape: Shape) -> int:
    """Return the number of parameters that are trained."""
    modules = module_sizes(run.model)
    return shape.num_params if run.lora is None or modules is None else run.lora.num_trained(modules)


def _adapter_state(run: Run, shape: Shape, num_trained: int, world_size: int) -> StateBytes:
    """Return the state of frozen weights, and of an adapter with its gradients and moments."""
    moments = run.optimizer.moments(shape)
    # as if its parameters were spread over the blocks like the model's own
    share = num_trained / shape.num_params
    of_adapter = replace(
        shape,
        num_params=num_trained,
        block_params=int(shape.block_params * share),
        vocab_size=max(1, int(shape.vocab_size * share)),
    )
    trained = run.parallel.state_bytes(of_adapter, world_size, run.precision, moments=moments)
    frozen = run.parallel.state_bytes(shape, world_size, run.precision, moments=moments)
    weights = int(frozen.parameters * _frozen_share(run, shape))
    parallel = run.parallel
    offload = getattr(parallel, "offload_parameters", "none"), getattr(parallel, "offload", "none")
    return replace(
        trained,
        parameters=weights + trained.parameters,
        host=trained.host + (weights if "cpu" in offload else 0),
        nvme=trained.nvme + (weights if "nvme" in offload else 0),
    )


def _frozen_share(run: Run, shape: Shape) -> float:
    """Return the bytes of the frozen weights, as a share of what they take without quantization."""
    method, modules = method_named(run.model.quantization), module_sizes(run.model)
    if method is None or modules is None:
        return 1.0
    quantized = sum(size.inputs * size.outputs for size in modules.linear.values())
    return 1 - quantized / shape.num_params * (1 - method.bytes_per_weight / 4)


def _checkpoint_copies(run: Run, shape: Shape, num_params: int, world_size: int) -> int:
    """Return the bytes of a rank's share of checkpoints that are written beside the steps."""
    num_bytes = _checkpoint_bytes(run, shape, num_params) // world_size
    asynchronous = run.checkpoint.is_async(num_bytes, on_nvme=run.parallel.keeps_state_on_nvme)
    return num_bytes if run.job.saves and run.checkpoint.every and asynchronous else 0


def _checkpoint_bytes(run: Run, shape: Shape, num_params: int) -> int:
    return round(4 * num_params * (1 + run.optimizer.moments(shape)))


def checkpoint_bytes(run: Run) -> int | None:
    """Return the size of a checkpoint, weights and moments in fp32; ``None`` if unknown."""
    shape = run.model.shape()
    return None if shape is None else _checkpoint_bytes(run, shape, _num_trained(run, shape))


def _weights_alone(run: Run, job: GeneratingJob, shape: Shape, hosts: Sequence[Host]) -> MemoryEstimate:
    """Return the memory of weights without training state: the compute format per copy."""
    size = run.precision.compute_bytes
    ways = run.parallel.dims(1).product if job.is_model_parallel(run) else 1
    adapters = sum(adapter.numel for adapter in job.adapter_folders().values())
    parameters = job.num_replicas * (size * shape.num_params // ways + LORA_BYTES * adapters)
    state = StateBytes(parameters=parameters, gradients=0, optimizer=0)
    shared, engines = f" ÷ {ways} ranks" if ways > 1 else "", counted(job.num_replicas, "engine")
    return MemoryEstimate(
        num_params=shape.num_params,
        per_rank=state,
        per_host_ram=max(host_ram(host, state) for host in hosts),
        per_host_nvme=0,
        formula=f"{size} bytes of {run.precision.compute} a parameter{shared}, in {engines}; "
        f"{f'{LORA_BYTES} bytes of fp32 a parameter of the adapters; ' if adapters else ''}"
        "keys and values by job.kv_cache_tokens",
    )
