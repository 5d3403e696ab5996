"""Number formats on a rank: what the device must have, and what torch is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from launcher.engines import formats
from launcher.engines.formats import prepare_formats, refuse_incapable
from launcher.errors import ConfigError
from launcher.precision import Bf16, Fp8, Fp16, Fp32, Precision, Tf32


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("precision", "capability", "why"),
    [
        (Tf32(), None, "precision=tf32: .*8.0 or more, and this rank has no GPU; set precision=fp32"),
        (Tf32(), (7, 5), "this GPU has 7.5; set precision=fp32"),
        (Fp8(), None, "precision=fp8: .*8.9 or more, and this rank has no GPU; set precision=bf16"),
        (Fp8(), (8, 6), "this GPU has 8.6; set precision=bf16"),
    ],
)
def test_devices_without_the_format_are_refused(
    precision: Precision, capability: tuple[int, int] | None, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        refuse_incapable(precision, capability)


@pytest.mark.parametrize(
    ("precision", "capability"),
    [
        (Tf32(), (8, 0)),
        (Fp8(), (8, 9)),
        (Fp8(), (9, 0)),
        (Fp8(), (12, 0)),
        (Fp32(), None),
        (Bf16(), None),
        (Fp16(), None),
    ],
)
def test_devices_with_it_are_not(precision: Precision, capability: tuple[int, int] | None) -> None:
    refuse_incapable(precision, capability)


def test_a_rank_on_the_cpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        prepare_formats(Tf32(), device=torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    prepare_formats(Fp32(), device=torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(formats.torch.cuda, "get_device_capability", lambda _: (9, 0))
    prepare_formats(Tf32(), device=torch.device("cuda", 0))
    assert torch.get_float32_matmul_precision() == "high"
