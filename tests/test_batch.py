import pytest

from launcher.config.batch import solve_batch
from launcher.errors import ConfigError


def test_the_equation_is_solved_for_what_was_left_out():
    assert solve_batch(micro=2, global_=64, accumulation=None, data_parallel=4).accumulation == 8
    assert solve_batch(micro=2, global_=None, accumulation=3, data_parallel=4).global_ == 24
    assert str(solve_batch(micro=2, global_=64, accumulation=8, data_parallel=4)) == "micro 2 × accum 8 × dp 4 = 64"


@pytest.mark.parametrize(
    ("global_", "accumulation", "message"),
    [
        (60, None, r"micro 2 × dp 4 = 8 does not divide 60; set job.global_batch=56 or job.global_batch=64"),
        (4, None, r"set job.global_batch=8"),
        (64, 2, r"micro 2 × accum 2 × dp 4 = 16; set job.global_batch=16 or leave out job.gradient_accumulation_steps"),
    ],
)
def test_what_does_not_multiply_out_is_refused_with_the_arithmetic(global_, accumulation, message):
    with pytest.raises(ConfigError, match=message):
        solve_batch(micro=2, global_=global_, accumulation=accumulation, data_parallel=4)
