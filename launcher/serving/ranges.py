"""The one table of what ways of sampling may be: servers, files of prompts, options of jobs and engines all use it.

Bounds keep arithmetic finite: scores are fp32, so dividing them by 1e-45 gives infinities, and these give no number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher.serving.values import Sampling

_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Range:
    """Which numbers a field may be."""

    least: float
    most: float
    usual: float
    """One that always works."""
    exclusive: bool = False
    """Whether ``least`` itself is too little."""
    or_zero: bool = False
    """Whether 0, below ``least``, has a meaning of its own."""

    def problem(self, value: float) -> str:
        """Return what is wrong with a number, nothing where it is in here."""
        if value != value:
            return "must be a number"
        if value > self.most:
            return f"must be at most {_shown(self.most)}"
        if value > self.least or (value == self.least and not self.exclusive) or (value == 0 and self.or_zero):
            return ""
        either = "0, or " if self.or_zero else ""
        return f"must be {either}{'above' if self.exclusive else 'at least'} {_shown(self.least)}"


RANGES: Mapping[str, Range] = {
    "max_tokens": Range(1, _MOST, 128),
    "min_tokens": Range(0, _MOST, 0),
    "temperature": Range(1e-6, 100.0, 1.0, or_zero=True),
    "top_k": Range(0, _MOST, 0),
    "top_p": Range(0.0, 1.0, 1.0, exclusive=True),
    "min_p": Range(0.0, 1.0, 0.0),
    "repetition_penalty": Range(0.01, 100.0, 1.0),
    "presence_penalty": Range(-2.0, 2.0, 0.0),
    "frequency_penalty": Range(-2.0, 2.0, 0.0),
    "no_repeat_ngram": Range(0, _MOST, 0),
    "seed": Range(0, 2**63 - 1, 0),
    "logprobs": Range(0, 20, 0),
    "beams": Range(1, 64, 1),
    "length_penalty": Range(-10.0, 10.0, 1.0),
}
"""Fields of ``Sampling`` that are numbers."""

BIAS = Range(-100.0, 100.0, 0.0)
"""What is added to the score of one token."""
MOST_BIASES = 1024
"""Tokens whose scores one request changes: more would make each step longer for all."""
MOST_STOP_IDS = 64
MOST_STOPS, LONGEST_STOP = 16, 256
"""Strings that end a text, and characters of each."""
CHOICES = Range(1, 1024, 1)
"""Answers to one prompt."""
PRIORITY = Range(-(2**31), _MOST, 0)


def out_of_range(sampling: Sampling) -> Iterator[tuple[str, str, float]]:
    """Yield each field that cannot be, with what is wrong and a value that works."""
    for name, limits in RANGES.items():
        value = getattr(sampling, name)
        if value is not None and (why := limits.problem(value)):
            yield name, why, limits.usual
    if len(sampling.bias) > MOST_BIASES:
        yield "bias", f"must be of at most {MOST_BIASES} tokens, not {len(sampling.bias)}", 0
    if len({token for token, _ in sampling.bias}) < len(sampling.bias):
        yield "bias", "must name each token once", 0
    why = next((why for _, added in sampling.bias if (why := BIAS.problem(added))), "")
    if why:
        yield "bias", f"{why}, for each token", 0
    if len(sampling.stop_ids) > MOST_STOP_IDS:
        yield "stop_ids", f"must be at most {MOST_STOP_IDS} tokens, not {len(sampling.stop_ids)}", 0
    if sampling.beams > 1 and sampling.temperature > 0:
        yield "beams", "beam search takes the likeliest sequences: it goes with temperature 0 alone", 1
    if sampling.beams > 1 and sampling.logprobs is not None:
        yield "logprobs", "beam search gives no log-probabilities", 0


def stops_problem(stops: Sequence[str]) -> str:
    """Return what is wrong with the strings that are to end a text, nothing where all are right."""
    if len(stops) > MOST_STOPS:
        return f"takes at most {MOST_STOPS} texts, not {len(stops)}"
    longest = max(map(len, stops), default=0)
    if longest > LONGEST_STOP:
        return f"takes texts of at most {LONGEST_STOP} characters, not {longest}"
    return ""


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
