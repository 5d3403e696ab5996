"""Requests, outputs and the interface of every inference engine. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.config.sampling import SamplingParams, validate_sampling
from launcher.inference.engine.block_manager import BLOCK_SIZE
from launcher.profiling.profiler import NO_PROFILER, Profiler

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
"""Why a request ended. ``stop``: a token that ends it; ``length``: ``max_tokens`` or the end of the context;
``timeout``: its deadline; ``error``: ``Update.problem`` says which."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One sequence to continue."""

    id: str
    """Unlike that of every other request in the engine."""
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: SamplingParams
    priority: int = 0
    """Higher is sooner; waiting makes up for a lower one (``Limits.aging_s``)."""
    queue_deadline_s: float | None = None
    """Seconds that it may wait before it is begun."""
    deadline_s: float | None = None
    """Seconds that it may take as a whole, waiting included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedToken:
    """One generated token."""

    id: int
    logprob: float | None = None
    """Log-probability under unchanged scores, where ``Sampling.logprobs`` asks for it."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log-probabilities, likeliest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOutput:
    """What became of a request in one step; those that nothing happened to have none."""

    request: str
    tokens: tuple[GeneratedToken, ...] = ()
    """New ones, in order."""
    finish: FinishReason | None = None
    """Set in the last update of a request, of which there is exactly one, whatever happens."""
    problem: str = ""
    """What went wrong, for a person, where ``finish`` is ``error``."""
    field: str = ""
    """Of ``Sampling``: set where the request's own value is what went wrong, and not the engine."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were there already; in the first update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """The engine at one moment. Counts that end in ``_total`` only grow."""

    running: int = 0
    waiting: int = 0
    kv_cache_tokens: int = 0
    """Tokens whose keys and values are held for running requests."""
    kv_cache_capacity: int = 0
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
    """Seconds since the last step ended, 0 where there is nothing to do. A high value means that the engine hangs."""


class Refused(Exception):
    """A request that the engine will never be able to serve; the message is for who sent it.

    Attributes:
        field: of ``Request`` or ``Sampling``, the one that is wrong.
    """

    def __init__(self, field: str, why: str) -> None:
        super().__init__(why)
        self.field = field


class InferenceEngine(ABC):
    """Continues many sequences at once. One thread calls it; nothing in it waits but ``step``."""

    profiler: Profiler = NO_PROFILER
    """Whatever is computed in this process is computed in steps of it; may be set at any time between two."""

    @abstractmethod
    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            Refused: it can never be served: longer than the context or the room for keys and values, an id outside
                the vocabulary, a way of sampling that this engine or model lacks.
        """

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """End a request before the next step; its last update says ``cancelled``. Unknown ones are let be."""

    @abstractmethod
    def step(self) -> Sequence[EngineOutput]:
        """Go one step further with whatever is most due; returns at once, with nothing, where nothing is to be done."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """Return where it stands."""

    @abstractmethod
    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Run once through each shape (sequences, tokens), so that no request pays for first times."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; requests still in it get no further update."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Most tokens of a sequence, prompt and output together."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        stats = self.stats()
        return not stats.running and not stats.waiting


def check_request(
    request: EngineRequest, *, known: Container[str], context: int, vocab_size: int, num_pages: int, max_num_seqs: int
) -> None:
    """Raise for a request that can never be served.

    Args:
        request: as it came.
        known: ids in use.
        context: most tokens of a sequence.
        vocab_size: of the model.
        num_pages: for keys and values.
        max_num_seqs: sequences at a time.

    Raises:
        Refused: with the field.
    """
    if request.id in known:
        raise Refused("id", f"the id {request.id!r} is in use")
    if not request.prompt:
        raise Refused("prompt", "the prompt has no tokens")
    if len(request.prompt) >= context:
        raise Refused("prompt", f"the prompt has {len(request.prompt)} tokens; {context - 1} leave room for an answer")
    _in_vocabulary("prompt", request.prompt, vocab_size)
    for field in ("queue_deadline_s", "deadline_s"):
        limit = getattr(request, field)
        if limit is not None and not limit >= 0:
            raise Refused(field, f"is {limit}, and must be at least 0")
    way = request.sampling
    _check_sampling(way, vocab_size)
    if way.num_beams > max_num_seqs:
        raise Refused("num_beams", f"{way.num_beams} beams; at most {max_num_seqs} sequences go on at a time")
    longest = min(len(request.prompt) + way.max_tokens, context)
    if way.num_beams > 1 and way.num_beams * (longest // BLOCK_SIZE + 1) > num_pages:
        room = num_pages * BLOCK_SIZE
        raise Refused(
            "num_beams",
            f"{way.num_beams} beams of {longest} tokens need more room than the {room} tokens that there are",
        )


def _check_sampling(way: SamplingParams, vocab_size: int) -> None:
    for field, why, _ in validate_sampling(way):
        value = getattr(way, field)
        raise Refused(field, why if isinstance(value, tuple) else f"is {value}: {why}")
    _in_vocabulary("logit_bias", [token for token, _ in way.logit_bias], vocab_size)
    _in_vocabulary("stop_token_ids", way.stop_token_ids, vocab_size)


def _in_vocabulary(field: str, ids: tuple[int, ...] | list[int], vocab_size: int) -> None:
    strange = next((token for token in ids if not 0 <= token < vocab_size), None)
    if strange is not None:
        raise Refused(field, f"{strange} is no token: ids go from 0 to {vocab_size - 1}")
