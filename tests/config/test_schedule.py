import pytest

from launcher.config.schedule import ConstantSchedule, CosineSchedule, LinearSchedule, WsdSchedule
from launcher.errors import ConfigErrors


def test_warm_up_rises_to_the_peak_without_reaching_zero_or_one():
    factors = [ConstantSchedule(warmup_steps=4).factor(step, 10) for step in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("schedule", [LinearSchedule(final_factor=0.1), CosineSchedule(final_factor=0.1)])
def test_decay_goes_from_one_to_the_final_factor(schedule):
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[0] == 1.0
    assert factors[100] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)
    assert factors[50] == pytest.approx(0.55)


def test_cosine_is_a_cosine():
    assert CosineSchedule(final_factor=0.0).factor(25, 100) == pytest.approx(0.8535533905932737)


def test_a_factor_depends_on_the_step_alone():
    schedule = CosineSchedule(warmup_steps=3)
    forwards = [schedule.factor(step, 20) for step in range(20)]
    backwards = [schedule.factor(step, 20) for step in reversed(range(20))]
    assert forwards == backwards[::-1]


def test_a_warm_up_below_one_is_a_share_of_the_steps():
    schedule = CosineSchedule(warmup_steps=0.03)
    assert [schedule.num_warmup_steps(steps) for steps in (1000, 10, 1)] == [30, 1, 1]
    assert schedule.factor(30, 1000) == 1.0
    assert schedule.factor(29, 1000) == pytest.approx(30 / 31)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0.75, 0.5, 0.25]),
        ("cosine", [0.8535533905932737, 0.5, 0.1464466094067262]),
        ("sqrt", [0.5, 1 - 0.5**0.5, 1 - 0.75**0.5]),
    ],
)
def test_wsd_is_stable_and_then_decays(shape, expected):
    schedule = WsdSchedule(warmup_steps=2, decay_steps=0.3, shape=shape)
    factors = [schedule.factor(step, 10) for step in range(10)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, *expected])
    assert schedule.factor(10, 10) == pytest.approx(0.0)


def test_wsd_of_a_longer_run_has_the_same_stable_phase():
    schedule = WsdSchedule(warmup_steps=5, decay_steps=10, final_factor=0.1)
    assert [schedule.factor(step, 100) for step in range(90)] == [schedule.factor(step, 400) for step in range(90)]
    assert schedule.factor(99, 100) > 0.1


@pytest.mark.parametrize("values", [{"decay_steps": -1}, {"decay_steps": 1.5}, {"warmup_steps": 2.5}])
def test_numbers_of_steps_that_are_refused(values):
    with pytest.raises(ConfigErrors, match=f"schedule.{next(iter(values))}="):
        WsdSchedule(**values)
