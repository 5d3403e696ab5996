"""Parameters of sampling, and the one table of their ranges for API, file jobs and engines.

The bounds keep arithmetic finite: scores are fp32, so dividing them by 1e-45 gives infinities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen; the default is greedy decoding.

    Names are vLLM's, or Transformers' where vLLM has none. Everything is applied in the order of Transformers'
    ``generate``: penalties, n-grams, ``logit_bias``, ``min_tokens``, temperature, top-k, top-p, min-p.
    """

    max_tokens: int
    """Tokens to generate at most, at least 1."""
    min_tokens: int = 0
    """Tokens before which nothing may end the sequence."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities add up to this."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divide scores (multiply negative ones) of earlier tokens by this (arXiv:1909.05858).
    Tokens of the prompt and the output count."""
    presence_penalty: float = 0.0
    """Subtract this from scores of tokens in the output, as OpenAI does."""
    frequency_penalty: float = 0.0
    """Subtract this from scores of tokens, once for each time that they are in the output."""
    no_repeat_ngram_size: int = 0
    """No sequence of this many tokens, prompt included, occurs twice; 0 allows all."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens and the values added to their scores."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence, besides the model's own; the output includes them."""
    ignore_eos: bool = False
    """Whether the model's own end-of-sequence tokens are tokens like any other."""
    seed: int | None = None
    """Seed of the request's own generator.
    The same seed and prompt give the same tokens in any batch."""
    logprobs: int | None = None
    """Also return log-probabilities, of each chosen token and of this many most likely ones.
    They are those of the unchanged scores."""
    num_beams: int = 1
    """Beams of beam search; 1 is no beam search.
    With more, all tokens come at once, at the end."""
    length_penalty: float = 1.0
    """Beam search compares sums of log-probabilities divided by length to the power of this."""

    @property
    def is_deterministic(self) -> bool:
        """Whether the same prompt gives the same tokens again."""
        return self.temperature == 0.0 or self.seed is not None


_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ParameterRange:
    """The range of numbers that a field accepts."""

    minimum: float
    maximum: float
    default: float
    """A value that every engine supports."""
    exclusive: bool = False
    """Whether ``minimum`` itself is outside the range."""
    or_zero: bool = False
    """Whether 0, below ``minimum``, is accepted too."""

    def validate(self, value: float) -> str:
        """Return why ``value`` is outside the range; empty if it is inside."""
        if value != value:
            return "must be a number"
        if value > self.maximum:
            return f"must be at most {_shown(self.maximum)}"
        if value > self.minimum or (value == self.minimum and not self.exclusive) or (value == 0 and self.or_zero):
            return ""
        either = "0, or " if self.or_zero else ""
        return f"must be {either}{'above' if self.exclusive else 'at least'} {_shown(self.minimum)}"


RANGES: Mapping[str, ParameterRange] = {
    "max_tokens": ParameterRange(1, _INT32_MAX, 128),
    "min_tokens": ParameterRange(0, _INT32_MAX, 0),
    "temperature": ParameterRange(1e-6, 100.0, 1.0, or_zero=True),
    "top_k": ParameterRange(0, _INT32_MAX, 0),
    "top_p": ParameterRange(0.0, 1.0, 1.0, exclusive=True),
    "min_p": ParameterRange(0.0, 1.0, 0.0),
    "repetition_penalty": ParameterRange(0.01, 100.0, 1.0),
    "presence_penalty": ParameterRange(-2.0, 2.0, 0.0),
    "frequency_penalty": ParameterRange(-2.0, 2.0, 0.0),
    "no_repeat_ngram_size": ParameterRange(0, _INT32_MAX, 0),
    "seed": ParameterRange(0, 2**63 - 1, 0),
    "logprobs": ParameterRange(0, 20, 0),
    "num_beams": ParameterRange(1, 64, 1),
    "length_penalty": ParameterRange(-10.0, 10.0, 1.0),
}
"""Fields of ``SamplingParams`` that are numbers."""

LOGIT_BIAS_RANGE = ParameterRange(-100.0, 100.0, 0.0)
"""Range of the value added to the score of one token."""
MAX_LOGIT_BIASES = 1024
"""Tokens whose scores one request changes: more would make each step longer for all."""
MAX_STOP_TOKEN_IDS = 64
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256
"""Strings that end a text, and characters of each."""
NUM_CHOICES_RANGE = ParameterRange(1, 1024, 1)
"""Answers to one prompt."""
PRIORITY_RANGE = ParameterRange(-(2**31), _INT32_MAX, 0)


def validate_sampling(sampling: SamplingParams) -> Iterator[tuple[str, str, float]]:
    """Yield each invalid field, with the reason and a value that works."""
    for name, limits in RANGES.items():
        value = getattr(sampling, name)
        if value is not None and (why := limits.validate(value)):
            yield name, why, limits.default
    if len(sampling.logit_bias) > MAX_LOGIT_BIASES:
        yield "logit_bias", f"must be of at most {MAX_LOGIT_BIASES} tokens, not {len(sampling.logit_bias)}", 0
    if len({token for token, _ in sampling.logit_bias}) < len(sampling.logit_bias):
        yield "logit_bias", "must name each token once", 0
    why = next((why for _, added in sampling.logit_bias if (why := LOGIT_BIAS_RANGE.validate(added))), "")
    if why:
        yield "logit_bias", f"{why}, for each token", 0
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        yield "stop_token_ids", f"must be at most {MAX_STOP_TOKEN_IDS} tokens, not {len(sampling.stop_token_ids)}", 0
    if sampling.num_beams > 1 and sampling.temperature > 0:
        yield "num_beams", "beam search takes the likeliest sequences: it needs temperature 0", 1
    if sampling.num_beams > 1 and sampling.logprobs is not None:
        yield "logprobs", "beam search gives no log-probabilities", 0


def validate_stop_strings(stops: Sequence[str]) -> str:
    """Return the error of stop strings; empty if all are valid."""
    if len(stops) > MAX_STOP_STRINGS:
        return f"takes at most {MAX_STOP_STRINGS} texts, not {len(stops)}"
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_LENGTH:
        return f"takes texts of at most {MAX_STOP_LENGTH} characters, not {longest}"
    return ""


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
