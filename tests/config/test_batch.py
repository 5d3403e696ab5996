import pytest

from launcher.config.batch import solve_batch
from launcher.errors import ConfigError
from launcher.protocol.plan import Batch


def test_the_equation_is_solved_for_what_was_left_out():
    def solve(global_batch: int | None, steps: int | None) -> Batch:
        return solve_batch(micro_batch=2, global_batch=global_batch, gradient_accumulation_steps=steps, data_parallel=4)

    assert solve(64, None).gradient_accumulation_steps == 8
    assert solve(None, 3).global_batch == 24
    assert str(solve(64, 8)) == "micro 2 × accum 8 × dp 4 = 64"


@pytest.mark.parametrize(
    ("global_batch", "accumulation", "message"),
    [
        (60, None, r"micro 2 × dp 4 = 8 does not divide 60; set job.global_batch=56 or job.global_batch=64"),
        (4, None, r"set job.global_batch=8"),
        (64, 2, r"micro 2 × accum 2 × dp 4 = 16; set job.global_batch=16 or leave out job.gradient_accumulation_steps"),
    ],
)
def test_what_does_not_multiply_out_is_refused_with_the_arithmetic(global_batch, accumulation, message):
    with pytest.raises(ConfigError, match=message):
        solve_batch(micro_batch=2, global_batch=global_batch, gradient_accumulation_steps=accumulation, data_parallel=4)
