"""Model state by strategy: what one rank holds, and what its host must have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launcher.config import Run
from launcher.jobs.generating import GeneratingJob
from launcher.models.base import Shape
from launcher.parallel.base import StateBytes
from launcher.plan import Host, Memory
from launcher.wording import times


def model_state(run: Run, hosts: Sequence[Host]) -> Memory | None:
    """Return the model state by formula; ``None`` when the model's sizes are only known once it is downloaded."""
    shape = run.model.shape()
    if shape is None:
        return None
    world_size = sum(host.slots for host in hosts)
    if isinstance(run.job, GeneratingJob):
        return _weights_alone(run, run.job, shape, hosts)
    state = run.parallel.state_bytes(shape, world_size, run.precision)
    formula = run.parallel.formula(world_size, run.precision)
    if not run.batched_job.learns and run.parallel.engine == "torch":
        host = min(state.host, state.parameters)
        state = replace(state, gradients=0, optimizer=0, host=host)
        formula = f"the weights alone, for nothing is learnt, of {formula}"
    return Memory(
        num_params=shape.num_params,
        per_rank=state,
        per_host_ram=max(host_ram(host, state) for host in hosts),
        per_host_nvme=max(host.slots * state.nvme for host in hosts),
        formula=formula,
    )


def _weights_alone(run: Run, job: GeneratingJob, shape: Shape, hosts: Sequence[Host]) -> Memory:
    """Return what weights take that nothing is learnt from: the compute format alone, once in each copy."""
    size = run.precision.compute_bytes
    ways = run.parallel.degrees(1).product if job.spreads(run) else 1
    parameters = job.copies * size * shape.num_params // ways
    state = StateBytes(parameters=parameters, gradients=0, optimizer=0)
    shared = f" ÷ {ways} ranks" if ways > 1 else ""
    return Memory(
        num_params=shape.num_params,
        per_rank=state,
        per_host_ram=max(host_ram(host, state) for host in hosts),
        per_host_nvme=0,
        formula=f"{size} bytes of {run.precision.compute} a parameter{shared}, in {times(job.copies, 'engine')}; "
        "keys and values by job.kv_tokens",
    )


def host_ram(host: Host, state: StateBytes) -> int:
    """Return the bytes of model state in one host's RAM: what is offloaded and, without GPUs, the rest too."""
    return host.slots * (state.host + (0 if host.devices or not host.is_known else state.device))
