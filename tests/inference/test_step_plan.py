"""Steps are cut into parts that do the same, one after the other."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from launcher.inference.engine.block_manager import BLOCK_SIZE
from launcher.inference.engine.step_plan import Segment, StepPlan, split_plan

segments = st.lists(
    st.builds(
        lambda start, count, needs_logits, adapter: Segment(
            start=start,
            tokens=tuple(range(start, start + count)),
            block_table=tuple(range(-(-(start + count) // BLOCK_SIZE))),
            needs_logits=needs_logits,
            adapter=adapter,
        ),
        st.integers(0, 70),
        st.integers(1, 80),
        st.booleans(),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=6,
).map(tuple)


@given(segments, st.integers(1, 5))
def test_every_token_is_computed_once_in_order_and_sees_what_is_before_it(
    whole: tuple[Segment, ...], count: int
) -> None:
    parts = split_plan(StepPlan(whole, copies=((1, 2),), padding=3), count)
    assert 1 <= len(parts) <= count
    assert [(part.copies, part.padding) for part in parts] == [(((1, 2),), 3)] + [((), 0)] * (len(parts) - 1)
    pieces = [piece for part in parts for piece in part.segments]
    assert [(token, piece.adapter) for piece in pieces for token in piece.tokens] == [
        (token, one.adapter) for one in whole for token in one.tokens
    ]
    assert sum(piece.needs_logits for piece in pieces) == sum(one.needs_logits for one in whole)
    for piece in pieces:
        assert piece.tokens[0] == piece.start
        assert len(piece.block_table) == -(-(piece.start + len(piece.tokens)) // BLOCK_SIZE)
    sizes = [sum(len(piece.tokens) for piece in part.segments) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(segments, st.booleans())
def test_a_plan_reaches_other_ranks_as_integers(whole: tuple[Segment, ...], stop: bool) -> None:
    drafted = tuple(replace(segment, num_drafts=len(segment.tokens) - 1) for segment in whole)
    plan = StepPlan(drafted, copies=((1, 2), (7, 0)), padding=3, first_layer=4, exit_layer=7, stop=stop)
    assert StepPlan.decode(plan.encode()) == plan
