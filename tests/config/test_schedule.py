import pytest

from launcher.config.schedule import ConstantSchedule, CosineSchedule, LinearSchedule


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
