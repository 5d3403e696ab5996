"""Requests, outputs and the interface of every inference engine. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.config.inference import EngineLimits
from launcher.config.sampling import SamplingParams, validate_sampling
from launcher.inference.engine.block_manager import BLOCK_SIZE
from launcher.profiling.profiler import NO_PROFILER, Profiler

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
"""Why a request ended: ``stop``, ``length``, ``cancelled``, ``timeout`` or ``error``.
``stop``: a token that ends it; ``length``: ``max_tokens`` or the end of the context; ``timeout``: its deadline;
``error``: ``EngineOutput.error`` says which."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestImage:
    """An image of a prompt, preprocessed."""

    content: str
    """SHA-256 in hexadecimal: requests with equal ones have the same image."""
    file: str
    """File with the model's inputs, as ``pack_arrays`` writes them.
    It exists until the request ends."""
    num_tokens: int
    """Image tokens that it takes in the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One sequence to continue."""

    id: str
    """Unlike that of every other request in the engine."""
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: SamplingParams
    images: tuple[RequestImage, ...] = ()
    """In the order of their tokens in the prompt."""
    adapter: str = ""
    """Name of its adapter; empty is the base model."""
    priority: int = 0
    """Higher is sooner; waiting makes up for a lower one (``EngineLimits.aging_s``)."""
    queue_deadline_s: float | None = None
    """Seconds that it may wait in the queue."""
    deadline_s: float | None = None
    """Seconds that it may take as a whole, the queue included."""

    def is_expired(self, age_s: float, *, is_started: bool) -> bool:
        """Return whether a deadline has passed, ``age_s`` after its arrival."""
        queue_deadline_s = None if is_started else self.queue_deadline_s
        return any(limit is not None and age_s > limit for limit in (self.deadline_s, queue_deadline_s))


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedToken:
    """One generated token."""

    id: int
    logprob: float | None = None
    """Log-probability under unchanged scores, where ``SamplingParams.logprobs`` asks for it."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log-probabilities, likeliest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOutput:
    """Output of one step for one request."""

    request_id: str
    tokens: tuple[GeneratedToken, ...] = ()
    """New ones, in order."""
    finish_reason: FinishReason | None = None
    """Set in the last output of a request; there is exactly one, whatever happens."""
    error: str = ""
    """Message of an error, if ``finish_reason`` is ``error``."""
    param: str = ""
    """The invalid field of ``SamplingParams``; empty if the engine failed."""
    num_cached_tokens: int = 0
    """Prompt tokens that were in the prefix cache; set in the first output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """The engine at one moment. Counts that end in ``_total`` only grow."""

    running: int = 0
    waiting: int = 0
    kv_cache_tokens: int = 0
    """Tokens whose keys and values are cached for running requests."""
    kv_cache_capacity: int = 0
    """Tokens that fit into the KV cache."""
    steps_total: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    padding_tokens_total: int = 0
    """Padding positions that were computed."""
    prefix_hit_tokens_total: int = 0
    prefix_query_tokens_total: int = 0
    preemptions_total: int = 0
    """Requests put back into the queue because the KV cache was full."""
    drafts_total: int = 0
    """Drafts of speculative decoding that were verified."""
    draft_tokens_total: int = 0
    accepted_tokens_total: int = 0
    """Drafted tokens that were accepted."""
    decoded_tokens_total: int = 0
    """Tokens of answers after the first, where the engine may draft; otherwise 0."""
    decoding_passes_total: float = 0.0
    """Passes through all layers, one after the other, that those took: without drafts 1 each."""
    since_step_s: float = 0.0
    """Seconds since the last step, 0 if there is no work.
    A high value means that the engine hangs."""

    @property
    def layer_share(self) -> float:
        """Share of the layers that ran one after the other for a decoded token; 1 without drafts."""
        return self.decoding_passes_total / self.decoded_tokens_total if self.decoded_tokens_total else 1.0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted."""
        return self.accepted_tokens_total / self.draft_tokens_total if self.draft_tokens_total else 0.0


def describe_speculation(stats: EngineStats) -> str:
    """Return in words what drafts have saved."""
    return (
        f"{stats.acceptance:.0%} of {stats.draft_tokens_total:,} drafted tokens accepted; "
        f"{stats.layer_share:.0%} of the layers run for a token"
    )


class InvalidRequest(Exception):
    """A request that the engine can never serve; the message is for the client.

    Attributes:
        param: the field of ``EngineRequest`` or ``SamplingParams`` that is wrong.
    """

    reason = "invalid"

    def __init__(self, param: str, why: str) -> None:
        super().__init__(why)
        self.param = param


_UNLIMITED_BLOCKS = 1 << 40


class InferenceEngine(ABC):
    """Generates for many requests at once. One thread calls it; only ``step`` blocks.

    Args:
        limits: sizes of steps and batches.
        max_model_len: longest sequence, prompt and output together.
        vocab_size: of the model.
        num_blocks: of the KV cache, where requests have to fit into one of this engine.
    """

    adapters: Sequence[str] = ()
    """Names of the adapters that requests may choose."""
    takes_images = False
    """Whether requests may have images."""
    profiler: Profiler = NO_PROFILER
    """Records the steps that this process computes; may be set between any two."""

    def __init__(
        self, limits: EngineLimits, *, max_model_len: int, vocab_size: int, num_blocks: int = _UNLIMITED_BLOCKS
    ) -> None:
        self.max_model_len = max_model_len
        self._limits, self._vocab_size, self._num_blocks = limits, vocab_size, num_blocks
        self._active: dict[str, Any] = {}
        """State of each active request, by id."""
        self._cancelled: list[str] = []

    def add(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: it can never be served: it is longer than the model or the KV cache takes, has ids outside
                the vocabulary, names an adapter that the engine lacks, or has sampling parameters that this engine or
                model does not support.
        """
        check_request(
            request,
            known=self._active,
            max_model_len=self.max_model_len,
            vocab_size=self._vocab_size,
            num_blocks=self._num_blocks,
            max_num_seqs=self._limits.max_num_seqs,
        )
        if request.adapter and request.adapter not in self.adapters:
            raise InvalidRequest("model", f"the engine has no adapter {request.adapter!r}")
        if request.images and not self.takes_images:
            raise InvalidRequest("messages", "the engine takes text only, and the request has images")
        self._accept(request)

    @abstractmethod
    def _accept(self, request: EngineRequest) -> None:
        """Queue a request that fits; raise ``InvalidRequest`` for unsupported parameters."""

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; its last output is ``cancelled``.

        Unknown ids are ignored.
        """
        if request_id in self._active:
            self._cancelled.append(request_id)

    @abstractmethod
    def step(self) -> Sequence[EngineOutput]:
        """Compute one step and return its outputs; return at once without work."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """Return its counts."""

    @abstractmethod
    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Run each shape (sequences, tokens) once, to compile and allocate before requests come."""

    def _run_shapes(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Generate two tokens for sequences of each shape in turn, cut to what fits."""
        assert not self._active, "warm up before the first request"
        for number, (sequences, tokens) in enumerate(shapes):
            length = max(1, min(tokens, self.max_model_len - 2))
            for index in range(min(sequences, self._limits.max_num_seqs)):
                prompt = tuple((number + index + place) % self._vocab_size for place in range(length))
                sampling = SamplingParams(max_tokens=2, ignore_eos=True)
                self.add(EngineRequest(id=f"warm-up {number} {index}", prompt=prompt, sampling=sampling))
            while self._active:
                self.step()

    @abstractmethod
    def close(self) -> None:
        """Free everything; requests still in it get no further output."""

    @property
    def idle(self) -> bool:
        """Whether no request is running or waiting."""
        stats = self.stats()
        return not stats.running and not stats.waiting


def check_request(
    request: EngineRequest,
    *,
    known: Container[str],
    max_model_len: int,
    vocab_size: int,
    num_blocks: int,
    max_num_seqs: int,
) -> None:
    """Raise for a request that can never be served.

    Args:
        request: as it came.
        known: ids in use.
        max_model_len: longest sequence, prompt and output together.
        vocab_size: of the model.
        num_blocks: of the KV cache.
        max_num_seqs: sequences in one step.

    Raises:
        InvalidRequest: with the field.
    """
    if request.id in known:
        raise InvalidRequest("id", f"the id {request.id!r} is in use")
    if not request.prompt:
        raise InvalidRequest("prompt", "the prompt has no tokens")
    if len(request.prompt) >= max_model_len:
        raise InvalidRequest(
            "prompt",
            f"the prompt has {len(request.prompt)} tokens; the model takes {max_model_len}, its answer included",
        )
    _in_vocabulary("prompt", request.prompt, vocab_size)
    for field in ("queue_deadline_s", "deadline_s"):
        limit = getattr(request, field)
        if limit is not None and not limit >= 0:
            raise InvalidRequest(field, f"is {limit}; must be at least 0")
    params = request.sampling
    _check_sampling(params, vocab_size)
    if params.num_beams > max_num_seqs:
        raise InvalidRequest("num_beams", f"{params.num_beams} beams; at most {max_num_seqs} sequences run at a time")
    longest = min(len(request.prompt) + params.max_tokens, max_model_len)
    if params.num_beams > 1 and params.num_beams * (longest // BLOCK_SIZE + 1) > num_blocks:
        capacity = num_blocks * BLOCK_SIZE
        raise InvalidRequest(
            "num_beams",
            f"{params.num_beams} beams of {longest} tokens do not fit into the KV cache of {capacity} tokens",
        )


def _check_sampling(params: SamplingParams, vocab_size: int) -> None:
    for field, why, _ in validate_sampling(params):
        value = getattr(params, field)
        raise InvalidRequest(field, why if isinstance(value, tuple) else f"is {value}: {why}")
    _in_vocabulary("logit_bias", [token for token, _ in params.logit_bias], vocab_size)
    _in_vocabulary("stop_token_ids", params.stop_token_ids, vocab_size)


def _in_vocabulary(field: str, ids: tuple[int, ...] | list[int], vocab_size: int) -> None:
    strange = next((token for token in ids if not 0 <= token < vocab_size), None)
    if strange is not None:
        raise InvalidRequest(field, f"{strange} is not a token id: ids go from 0 to {vocab_size - 1}")
