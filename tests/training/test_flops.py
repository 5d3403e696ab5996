"""Peak rates by device and precision."""

from __future__ import annotations

import pytest

from launcher.config.registry import KINDS
from launcher.profiling.performance import peak_flops


@pytest.mark.parametrize(
    ("device", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.0),
        ("NVIDIA H100 80GB HBM3", "fp32", 67.0),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979.0),
        ("NVIDIA H100 PCIe", "fp8", 1513.0),
    ],
)
def test_peaks(device: str, precision: str, tflops: float) -> None:
    assert peak_flops(device, precision=precision) == 1e12 * tflops


def test_what_a_device_lacks_has_no_peak() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", precision="fp8") is None
    assert peak_flops("Tesla T4", precision="tf32") is None
    assert peak_flops("Unheard of", precision="bf16") is None


def test_every_precision_has_a_column() -> None:
    for precision in KINDS["precision"]:
        assert peak_flops("NVIDIA H100", precision=precision)
