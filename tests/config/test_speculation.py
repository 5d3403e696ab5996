"""Drafts are refused where nothing can be drafted, or drafts would have no effect."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.config.compose import compose
from launcher.config.validate import validate_overrides_used
from launcher.errors import ConfigErrors
from tests.conftest import BOX, PlanOf

DRAFTS = ("model=llama_tiny", "job.speculation=early_exit")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("job.engine=echo",), "job.speculation=early_exit: job.engine=echo drafts nothing: only job.engine=paged"),
        (("job.batching=static",), "computes one token of a sequence at a time"),
        (("job.speculation_layers=9",), "layers, and at least one must be left to verify"),
        (("job.speculation_layers=0",), "job.speculation_layers=0"),
        (("job.speculation_tokens=0",), "job.speculation_tokens=0"),
        (("model.num_hidden_layers=1",), "has one layer"),
        (("parallel=pipeline", "backend.ranks=2"), "first and last layers on different ranks"),
        (("job.num_beams=2",), "beam search (job.num_beams=2) drafts nothing"),
        (("job.speculation=ngram",), "none, early_exit"),
    ],
)
def test_what_cannot_draft_is_refused(plan_of: PlanOf, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigErrors) as raised:
        plan_of("job=generate", *DRAFTS, *words)
    assert said in str(raised.value)


def test_the_plan_names_the_layers_that_draft(plan_of: PlanOf) -> None:
    for job in ("generate", "serve"):
        words = (f"job={job}", "parallel=single", "job.speculation_tokens=3", "job.speculation_layers=1")
        text = str(plan_of(*DRAFTS, *words, hosts=[replace(BOX, slots=1)]))
        assert "the first layer drafts at most 3 tokens; ends where it costs time" in text


@pytest.mark.parametrize("word", ["job.speculation_layers=1", "job.speculation_tokens=2"])
def test_options_without_effect_are_refused(word: str) -> None:
    words = ["job=generate", "model=llama_tiny", "tracker=local", word]
    (error,) = validate_overrides_used(compose(words).run, words)
    assert str(error).startswith(word)
