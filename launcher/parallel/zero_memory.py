"""Bytes of model state under ZeRO.

With Ψ parameters on N ranks, sections 3 and 5 of the ZeRO paper (arXiv:1910.02054) give 2Ψ + 2Ψ + KΨ bytes in mixed
precision, with K = 12 for Adam (fp32 master weights and two moments), each term divided by N from the stage on that
partitions it; in fp32 the terms are 4Ψ + 4Ψ + 8Ψ. DeepSpeed holds more than the paper in two places, counted here:

- in fp32, every stage from 1 on copies its partition of the weights (K = 12), as ``benchmark=memory`` finds;
- offloading the optimiser adds one fp32 gradient per parameter of the partition beside the moments (4Ψ/N).
"""

from __future__ import annotations

from launcher.parallel.base import StateBytes

_PARTITIONED_SINCE = {"optimizer": 1, "gradients": 2, "parameters": 3}
"""The stage from which each part of the state is divided among the ranks."""


def state_bytes(
    num_params: int,
    world_size: int,
    *,
    stage: int,
    compute_bytes: int,
    low_memory: bool,
    optimizer_on: str,
    parameters_on: str,
    parameters_in_ram: int,
) -> StateBytes:
    """Return one rank's parameters, gradients and optimiser state in bytes.

    Args:
        num_params: Ψ.
        world_size: N, the data-parallel size.
        stage: ZeRO's stage, 0 to 3.
        compute_bytes: bytes of one value in the compute format.
        low_memory: master weights, gradients and moments in bf16.
        optimizer_on: ``none``, ``cpu`` or ``nvme``.
        parameters_on: ``none``, ``cpu`` or ``nvme``.
        parameters_in_ram: elements that stay in RAM although parameters are on NVMe.
    """
    share = -(-num_params // world_size)
    elements = {name: share if stage >= since else num_params for name, since in _PARTITIONED_SINCE.items()}
    state_size = 2 if low_memory else 4
    copies_weights = compute_bytes == 2 or stage > 0
    parameters = compute_bytes * elements["parameters"]
    gradients = compute_bytes * elements["gradients"]
    optimizer = state_size * (3 if copies_weights else 2) * elements["optimizer"]
    staged = state_size * share if optimizer_on != "none" else 0
    host = nvme = 0
    if optimizer_on == "cpu":
        host += optimizer + staged
    if optimizer_on == "nvme":
        nvme += optimizer + staged
    if optimizer_on != "none" and stage == 3:
        host += gradients
    if parameters_on == "cpu":
        host += parameters
    if parameters_on == "nvme":
        resident = compute_bytes * min(parameters_in_ram, elements["parameters"])
        host, nvme = host + resident, nvme + parameters - resident
    return StateBytes(parameters=parameters, gradients=gradients + staged, optimizer=optimizer, host=host, nvme=nvme)


def formula(world_size: int, *, stage: int, mixed: bool, low_memory: bool, offloads: bool) -> str:
    """Return the arithmetic of :func:`state_bytes` in words, with its source."""
    size, state_size = (2 if mixed else 4), (2 if low_memory else 4)
    states = state_size * (3 if mixed or stage > 0 else 2)
    terms = (("parameters", size, "weights"), ("gradients", size, "gradients"), ("optimizer", states, "optimiser"))
    parts = []
    for term, factor, word in terms:
        divided = f" / {world_size}" if stage >= _PARTITIONED_SINCE[term] else ""
        parts.append(f"{factor}N {word}{divided}")
    if offloads:
        parts.append(f"{state_size}N gradients / {world_size} beside the offloaded optimiser")
    return f"{' + '.join(parts)} bytes (ZeRO, arXiv:1910.02054, sec. 3.1 and 5)"
