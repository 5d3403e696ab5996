"""Peak arithmetic rates, so that model FLOPs utilisation has a denominator."""

from __future__ import annotations

import time
from typing import Final

PEAK_TFLOPS: Final = {
    # Dense tensor-core peak without sparsity, from the vendors' data sheets: (16-bit, fp32 with TF32 off).
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}
"""Peak TFLOP/s by a part of the device's name; the first match counts."""

_SIDE = 1024


def peak_flops(device_name: str | None, *, compute: str) -> float | None:
    """Return the peak FLOP/s of one rank's device, or ``None`` for a GPU that is not in the table.

    Args:
        device_name: the GPU's name; ``None`` for a CPU, whose rate is measured, not looked up.
        compute: ``fp32``, ``bf16`` or ``fp16``.
    """
    if device_name is None:
        return measured_matmul_flops(compute)
    for part, (half, single) in PEAK_TFLOPS.items():
        if part in device_name:
            return 1e12 * (single if compute == "fp32" else half)
    return None


def measured_matmul_flops(compute: str) -> float:
    """Return the best FLOP/s of a square matrix product on this rank's CPU threads, all ranks measuring at once."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[compute]
    left = torch.full((_SIDE, _SIDE), 0.5, dtype=dtype)  # not random: that would shift the dropout of a resumed run
    best = float("inf")
    for _ in range(4):  # the first one also warms up
        started = time.perf_counter()
        torch.mm(left, left)
        best = min(best, time.perf_counter() - started)
    return 2.0 * _SIDE**3 / best
