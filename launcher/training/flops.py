"""Peak arithmetic rates, so that model FLOPs utilisation has a denominator."""

from __future__ import annotations

from typing import Final

PEAK_TFLOPS: Final = {
    # Dense peak without sparsity, from the vendors' data sheets: 16-bit, fp32 with TF32 off, TF32, 8-bit.
    "H200": (989.0, 67.0, 494.7, 1979.0),
    "H100 PCIe": (756.0, 51.0, 378.0, 1513.0),
    "H100": (989.0, 67.0, 494.7, 1979.0),
    "A100": (312.0, 19.5, 156.0, None),
    "L40S": (362.0, 91.6, 183.0, 733.0),
    "L4": (121.0, 30.3, 60.0, 242.5),
    "A10": (125.0, 31.2, 62.5, None),
    "V100": (125.0, 15.7, None, None),
    "T4": (65.0, 8.1, None, None),
    "RTX 4090": (165.2, 82.6, 82.6, 330.3),
    "RTX 3090": (71.0, 35.6, 35.6, None),
}
"""Peak TFLOP/s by a part of the device's name, the first match counts; ``None`` where it lacks the format."""

_COLUMNS: Final = {"bf16": 0, "fp16": 0, "fp32": 1, "tf32": 2, "fp8": 3}


def peak_flops(device_name: str, *, precision: str) -> float | None:
    """Return the stated peak FLOP/s of a GPU, or ``None`` for one, or a format, that is not in the table.

    A CPU has none: what a probe measures depends on what else runs, and shares of it have been over 100%.

    Args:
        device_name: the GPU's name.
        precision: the option of the group; under fp8 the share of the products that stay in 16 bits is not counted.
    """
    for part, peaks in PEAK_TFLOPS.items():
        if part in device_name:
            peak = peaks[_COLUMNS[precision]]
            return None if peak is None else 1e12 * peak
    return None
