"""``make_plan``: a pure function from a run and its hosts to everything a backend needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from launcher import checks
from launcher.advice import warnings_of
from launcher.agents import AGENTS
from launcher.batch import Batch, solve_batch
from launcher.config import Run
from launcher.env import Place, environment
from launcher.errors import ConfigError, ConfigErrors
from launcher.facts import Facts
from launcher.memory import model_state
from launcher.parallel.zero import Zero
from launcher.plan import Command, Host, HostPlan, Identity, Plan, TrackerPlan, What, Work
from launcher.topology import degrees, first_ranks, rank_places
from launcher.wording import component_text


def make_plan(run: Run, hosts: Sequence[Host], identity: Identity, facts: Facts) -> Plan:
    """Return the plan of ``run`` on ``hosts``.

    Args:
        run: the typed configuration.
        hosts: where ranks go, in the order of ranks.
        identity: id, directory, hash and port of this run.
        facts: what was found on the machine that plans.

    Raises:
        ConfigErrors: everything that keeps the run from working there.
    """
    world_size = sum(host.slots for host in hosts)
    mistakes = list(checks.refusals(run, hosts))
    batch = _batch(run, world_size, mistakes)
    if mistakes or batch is None:
        raise ConfigErrors(mistakes)
    memory = model_state(run, hosts)
    tracker = TrackerPlan(kind="local", mode="local", reason="nothing else is configured", run_id=identity.run_id)
    tokens = batch.global_ * run.job.sequence_length
    return Plan(
        run_id=identity.run_id,
        name=run.run.name,
        run_dir=identity.run_dir,
        run_hash=identity.run_hash,
        job=run.job.kind,
        world_size=world_size,
        topology=degrees(run.parallel, world_size),
        what=_what(run),
        port=identity.port,
        ranks=tuple(rank_places(hosts)),
        hosts=tuple(_host_plans(run, hosts, identity, facts, tracker)),
        work=Work(batch=batch, steps=run.job.steps, tokens_per_step=tokens, total_tokens=tokens * run.job.steps),
        memory=memory,
        deepspeed=_deepspeed(run, batch),
        tracker=tracker,
        files=tuple(_files(run, hosts, tracker)),
        stall_timeout_s=run.backend.stall_timeout_s,
        grace_s=run.backend.grace_s,
        show_ranks=None if run.backend.show_ranks == "all" else run.backend.show_ranks,
        warnings=tuple(warnings_of(run, hosts, memory)),
    )


def _batch(run: Run, world_size: int, mistakes: list[ConfigError]) -> Batch | None:
    job = run.job
    try:
        return solve_batch(
            micro=job.micro_batch,
            global_=job.global_batch,
            accumulation=job.accumulation,
            data_parallel=run.parallel.data_parallel(world_size),
        )
    except ConfigError as error:
        mistakes.append(error)
        return None


def _deepspeed(run: Run, batch: Batch) -> dict[str, Any] | None:
    """Return what DeepSpeed is configured with, provided that every native op is built."""
    zero = run.parallel
    if not isinstance(zero, Zero):
        return None
    return zero.ds_config(
        batch=batch,
        clip_norm=run.job.clip_norm,
        optimizer=run.optimizer,
        precision=run.precision,
        native_adam=zero.wants_native_adam(run.optimizer),
    )


def _what(run: Run) -> What:
    return What(
        model=component_text(run.model),
        data=component_text(run.data),
        strategy=component_text(run.parallel),
        engine=run.parallel.engine,
        precision=component_text(run.precision),
        optimizer=component_text(run.optimizer),
        schedule=component_text(run.schedule),
        activation=component_text(run.activation),
        attention=component_text(run.attention),
        checkpoint=component_text(run.checkpoint),
    )


def _host_plans(
    run: Run, hosts: Sequence[Host], identity: Identity, facts: Facts, tracker: TrackerPlan
) -> Iterator[HostPlan]:
    commands = AGENTS[run.backend.agent](hosts, identity)
    for number, (host, first, argv) in enumerate(zip(hosts, first_ranks(hosts), commands, strict=True)):
        place = Place(host=host, number=number, num_hosts=len(hosts))
        env = environment(run, place, identity, ops_folder=facts.ops_folder)
        yield HostPlan(
            host=host,
            first_rank=first,
            prepare=tuple(_prepare(host, facts)),
            start=Command(argv=argv, env=env),
            sidecars=tuple(_sidecars(host, identity, tracker)) if number == 0 else (),
        )


def _prepare(host: Host, facts: Facts) -> Iterator[Command]:
    """Yield one command that builds DeepSpeed's missing native ops, one after the other."""
    if facts.missing_ops:
        argv = (host.python, "-m", "launcher.ops", *facts.missing_ops)
        yield Command(argv=argv, env={"TORCH_EXTENSIONS_DIR": facts.ops_folder})


def _sidecars(host: Host, identity: Identity, tracker: TrackerPlan) -> Iterator[Command]:
    """Yield the process that carries metrics.jsonl to W&B."""
    if tracker.kind == "wandb" and tracker.mode != "disabled":
        yield Command(argv=(host.python, "-m", "launcher.trackers.sidecar", identity.run_dir))


def _files(run: Run, hosts: Sequence[Host], tracker: TrackerPlan) -> Iterator[str]:
    """Yield what the run writes, relative to its directory."""
    yield from ("run.yaml", "plan.json", "metrics.jsonl", "result.json", "loss.png")
    if run.job.sample_tokens:
        yield "sample.txt"
    yield "failure.json (if a rank fails)"
    world_size = sum(host.slots for host in hosts)
    yield f"logs/{hosts[0].name}.0.log … one for each of {world_size} ranks"
    if run.checkpoint.every or run.checkpoint.at_end:
        yield "checkpoints/step_<n>/"
    if tracker.kind == "wandb" and tracker.mode != "disabled":
        yield "wandb/"
