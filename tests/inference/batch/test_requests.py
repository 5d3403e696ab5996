"""What a line may ask for."""

from __future__ import annotations

import pytest

from launcher.config.data.rows import Record
from launcher.config.prompt_file import BadLine
from launcher.inference.batch.requests import line_seed, parse_request
from launcher.inference.tokenizer import byte_tokenizer

WORDS = byte_tokenizer()
USUAL = {"max_tokens": 16, "stop": (), "temperature": 0.0}


def parsed(*, line: int = 1, seed: int = 0, **fields):
    return parse_request(Record(0, line, fields), USUAL, WORDS, seed=seed)


def test_a_line_wins_over_the_options_and_null_says_nothing() -> None:
    found = parsed(prompt="ab", max_tokens=3, temperature=None, stop="x", logprobs=2, logit_bias=[[5, -1.5]])
    assert found.prompt == (97, 98)
    assert (found.sampling.max_tokens, found.sampling.temperature, found.stop) == (3, 0.0, ("x",))
    assert (found.sampling.logprobs, found.sampling.logit_bias) == (2, ((5, -1.5),))
    assert parsed(prompt=[1, 2]).prompt == (1, 2)
    assert parsed(prompt="a").sampling.max_tokens == 16


def test_what_is_drawn_has_a_seed_of_run_and_line() -> None:
    assert parsed(prompt="a").sampling.seed is None
    assert parsed(prompt="a", temperature=1, seed=5).sampling.seed is not None
    drawn = [parsed(prompt="a", temperature=1.0, line=line).sampling.seed for line in (1, 2, 1)]
    assert drawn[0] == drawn[2] == line_seed(0, 1) != drawn[1]
    assert (
        parse_request(Record(0, 1, {"prompt": "a", "temperature": 1.0, "seed": 5}), USUAL, WORDS, seed=9).sampling.seed
        == 5
    )
    assert (
        parse_request(Record(0, 1, {"prompt": "a", "temperature": 1.0}), USUAL, WORDS, seed=9).sampling.seed != drawn[0]
    )


def test_a_line_names_its_adapter_or_the_base_model() -> None:
    models = {"tiny": "", "polite": "polite"}

    def adapter(default: str | None, **fields: object) -> str:
        record = Record(0, 1, {"prompt": "a", **fields})
        return parse_request(record, {**USUAL, "model": default}, WORDS, seed=0, models=models).adapter

    assert adapter(None) == adapter(None, model="tiny") == adapter("polite", model="tiny") == ""
    assert adapter("polite") == adapter("polite", model=None) == adapter(None, model="polite") == "polite"
    for wrong in ("polit", 5, ["polite"]):
        with pytest.raises(BadLine, match=r"model: there is no model .*(polite|choose from)"):
            adapter(None, model=wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs prompt or messages"),
        ({"prompt": "a", "messages": []}, "needs prompt or messages"),
        ({"prompt": ""}, "prompt: is empty"),
        ({"prompt": []}, "prompt: is empty"),
        ({"prompt": 5}, "prompt: takes text"),
        ({"prompt": [1, True]}, "prompt: takes text"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": "a", "temprature": 1}, "temprature: no such field; did you mean temperature"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens=0: must be at least 1"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens=many"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "top_p": 0}, "top_p=0.*: must be above 0"),
        ({"prompt": "a", "top_p": 1.5}, "top_p=1.5: must be at most 1"),
        ({"prompt": "a", "seed": -1}, "seed=-1"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "temperature": 1e999}, "temperature"),
        ({"prompt": "a", "stop": [""]}, "stop: takes"),
        ({"prompt": "a", "stop": {"a": 1}}, "stop: takes"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no chat template"),
        ({"messages": [{"role": "user"}]}, "messages: takes"),
        ({"messages": "hi"}, "messages: takes"),
    ],
)
def test_what_cannot_be_done_is_said(fields, message) -> None:
    with pytest.raises(BadLine, match=message):
        parse_request(Record(0, 1, fields), USUAL, WORDS, seed=0)
