"""The dynamic loss scale, step by step, beside DeepSpeed's own."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.config.precision import Bf16Precision, Fp16Precision
from launcher.engines.deepspeed.base import read_loss_scale, set_loss_scale
from launcher.engines.optimizer import LossScale


def test_halves_once_the_hysteresis_is_used_up_and_not_below_the_floor() -> None:
    scale = LossScale(Fp16Precision(initial_scale_power=3, hysteresis=2, min_scale=2.0))
    values = []
    for _ in range(5):
        scale.update(overflow=True)
        values.append(scale.value)
    assert values == [8, 4, 2, 2, 2]


def test_other_precisions_scale_nothing_and_pass_nothing_on() -> None:
    scale, half = LossScale(Bf16Precision()), LossScale(Fp16Precision(initial_scale_power=4))
    scale.update(overflow=True)
    scale.restore(half.state())
    assert scale.value == 1.0
    half.restore(scale.state())
    assert half.value == 16.0


def test_a_restored_scale_continues_alike() -> None:
    settings = Fp16Precision(initial_scale_power=4, scale_window=2)
    one, other = LossScale(settings), LossScale(settings)
    for overflow in (True, False, False):
        one.update(overflow=overflow)
    other.restore(one.state())
    for overflow in (False, True, False, False, False):
        one.update(overflow=overflow)
        other.update(overflow=overflow)
        assert one.state() == other.state()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(5))
def test_moves_as_deepspeeds_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import torch
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # it asks, only to log on rank 0
    settings = Fp16Precision(initial_scale_power=16, scale_window=3, hysteresis=2)

    def deepspeed_optimizer() -> Any:
        scaler = loss_scaler.DynamicLossScaler(
            dtype=torch.half,
            init_scale=2**16,
            scale_window=3,
            delayed_shift=2,
            consecutive_hysteresis=False,
            min_scale=1.0,
            raise_error_at_min_scale=False,
        )
        return SimpleNamespace(loss_scaler=scaler)

    peer, ours, draw = deepspeed_optimizer(), LossScale(settings), random.Random(seed)
    for _ in range(200):
        overflow = draw.random() < 0.2
        peer.loss_scaler.update_scale(overflow)
        ours.update(overflow=overflow)
        assert ours.value == peer.loss_scaler.cur_scale
        if draw.random() < 0.1:  # a run that goes on under the other engine
            kept, peer, ours = (read_loss_scale(peer), ours.state()), deepspeed_optimizer(), LossScale(settings)
            ours.restore(kept[0])
            set_loss_scale(peer, kept[1])
