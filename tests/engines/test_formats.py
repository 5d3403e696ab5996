"""Number formats on a rank: what the device must have, and what torch is set to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from launcher.config.precision import (
    Bf16Precision,
    Fp8Precision,
    Fp16Precision,
    Fp32Precision,
    Precision,
    Tf32Precision,
)
from launcher.engines import model
from launcher.engines.model import check_capability, prepare_precision
from launcher.errors import ConfigError


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("precision", "capability", "why"),
    [
        (Tf32Precision(), None, "precision=tf32: .*8.0 or more, and this rank has no GPU; set precision=fp32"),
        (Tf32Precision(), (7, 5), "this GPU has 7.5; set precision=fp32"),
        (Fp8Precision(), None, "precision=fp8: .*8.9 or more, and this rank has no GPU; set precision=bf16"),
        (Fp8Precision(), (8, 6), "this GPU has 8.6; set precision=bf16"),
    ],
)
def test_devices_without_the_format_are_refused(
    precision: Precision, capability: tuple[int, int] | None, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        check_capability(precision, capability)


@pytest.mark.parametrize(
    ("precision", "capability"),
    [
        (Tf32Precision(), (8, 0)),
        (Fp8Precision(), (8, 9)),
        (Fp8Precision(), (9, 0)),
        (Fp8Precision(), (12, 0)),
        (Fp32Precision(), None),
        (Bf16Precision(), None),
        (Fp16Precision(), None),
    ],
)
def test_devices_with_it_are_not(precision: Precision, capability: tuple[int, int] | None) -> None:
    check_capability(precision, capability)


def test_a_rank_on_the_cpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        prepare_precision(Tf32Precision(), device=torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    prepare_precision(Fp32Precision(), device=torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(model.torch.cuda, "get_device_capability", lambda _: (9, 0))
    prepare_precision(Tf32Precision(), device=torch.device("cuda", 0))
    assert torch.get_float32_matmul_precision() == "high"
