"""What torch's averages say of operators, kernels and named stretches, as plain values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Sort = Literal["operator", "kernel", "stretch"]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator, kernel or named stretch, all its calls together. Times are seconds."""

    name: str
    sort: Sort
    calls: int
    self_s: float
    """On the CPU, what it calls left out."""
    total_s: float
    """On the CPU, what it calls included."""
    device_s: float
    """On the GPU: of a kernel, its own; of an operator, that of the kernels it launched itself."""
    self_bytes: int
    """Memory it allocated, less what it released; what it calls left out."""
    shapes: str = ""
    """Of its inputs, where they are told apart."""


def operators_of(averages: Iterable[Any]) -> list[Operator]:
    """Return torch's averages; those of what takes no time at all are left out."""
    found = [_operator(average) for average in averages]
    return [operator for operator in found if operator.total_s or operator.device_s]


def _operator(average: Any) -> Operator:
    from torch.autograd import DeviceType

    on_cpu = average.device_type == DeviceType.CPU
    kind: Sort = "stretch" if average.is_user_annotation else "operator" if on_cpu else "kernel"
    return Operator(
        name=str(average.key),
        sort=kind,
        calls=int(average.count),
        self_s=average.self_cpu_time_total / 1e6,
        total_s=average.cpu_time_total / 1e6,
        device_s=average.self_device_time_total / 1e6,
        self_bytes=int(average.self_device_memory_usage or average.self_cpu_memory_usage),
        shapes=" ".join(map(_shape, average.input_shapes or ())),
    )


def _shape(sizes: Any) -> str:
    return "×".join(map(str, sizes)) if sizes else "-"
