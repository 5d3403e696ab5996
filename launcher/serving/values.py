"""What goes into a generation engine and what comes out: plain values, without torch, that pass between processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Finish = Literal["stop", "length", "cancelled", "timeout", "error"]
"""Why a request ended. ``stop``: a token that ends it; ``length``: ``max_tokens`` or the end of the context;
``timeout``: its deadline; ``error``: ``Update.problem`` says which."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy decoding without any change to the scores.

    Everything is applied in the order of Transformers' ``generate``: penalties, n-grams, ``bias``, ``min_tokens``,
    temperature, top-k, top-p, min-p.
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
    """Divide (multiply, where negative) scores of tokens in prompt and output by this (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtract this from scores of tokens in the output, as OpenAI does."""
    frequency_penalty: float = 0.0
    """Subtract this from scores of tokens, once for each time that they are in the output."""
    no_repeat_ngram: int = 0
    """No sequence of this many tokens, prompt included, occurs twice; 0 allows all."""
    bias: tuple[tuple[int, float], ...] = ()
    """Tokens and what is added to their scores."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the sequence, besides the model's own; the last token of the output is then one of them."""
    ignore_end: bool = False
    """Whether the model's own end-of-sequence tokens are tokens like any other."""
    seed: int | None = None
    """Of this request's own random generator: the same seed and prompt give the same tokens in any company."""
    logprobs: int | None = None
    """Also return the log-probability of each chosen token and of this many most likely ones (of unchanged scores)."""
    beams: int = 1
    """Sequences that beam search keeps; 1 is no beam search. With more, tokens come all at once, at the end."""
    length_penalty: float = 1.0
    """Beam search compares sums of log-probabilities divided by length to the power of this."""

    @property
    def repeatable(self) -> bool:
        """Whether the same prompt gives the same tokens again."""
        return self.temperature == 0.0 or self.seed is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to continue."""

    id: str
    """Unlike that of every other request in the engine."""
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: Sampling
    priority: int = 0
    """Higher is sooner; waiting makes up for a lower one (``Limits.ageing_s``)."""
    queue_deadline_s: float | None = None
    """Seconds that it may wait before it is begun."""
    deadline_s: float | None = None
    """Seconds that it may take as a whole, waiting included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One generated token."""

    id: int
    logprob: float | None = None
    """Log-probability under unchanged scores, where ``Sampling.logprobs`` asks for it."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log-probabilities, likeliest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What became of a request in one step; those that nothing happened to have none."""

    request: str
    tokens: tuple[Token, ...] = ()
    """New ones, in order."""
    finish: Finish | None = None
    """Set in the last update of a request, of which there is exactly one, whatever happens."""
    problem: str = ""
    """What went wrong, for a person, where ``finish`` is ``error``."""
    field: str = ""
    """Of ``Sampling``: set where the request's own value is what went wrong, and not the engine."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were there already; in the first update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """The engine at one moment. Counts that end in ``_total`` only grow."""

    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    """Tokens whose keys and values are held for running requests."""
    kv_capacity: int = 0
    """Tokens that can be held."""
    steps_total: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    padding_tokens_total: int = 0
    """Positions computed for no request's sake."""
    prefix_hit_tokens_total: int = 0
    prefix_query_tokens_total: int = 0
    preemptions_total: int = 0
    """Requests put back into the queue for want of room."""
    since_step_s: float = 0.0
    """Seconds since the last step ended, 0 where there is nothing to do: how an engine that hangs is told."""


class Refused(Exception):
    """A request that the engine will never be able to serve; the message is for who sent it.

    Attributes:
        field: of ``Request`` or ``Sampling``, the one that is wrong.
    """

    def __init__(self, field: str, why: str) -> None:
        super().__init__(why)
        self.field = field
