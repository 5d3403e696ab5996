"""Which requests can never be served, told before they are queued."""

from __future__ import annotations

import math
from collections.abc import Container

from launcher.serving.pages import PAGE
from launcher.serving.values import Refused, Request, Sampling

_LARGEST_SEED = 2**63


def check(
    request: Request, *, known: Container[str], context: int, vocab_size: int, num_pages: int, max_requests: int
) -> None:
    """Refuse what can never be served.

    Args:
        request: as it came.
        known: ids in use.
        context: most tokens of a sequence.
        vocab_size: of the model.
        num_pages: for keys and values.
        max_requests: sequences at a time.

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
    if way.beams > max_requests:
        raise Refused("beams", f"{way.beams} beams; at most {max_requests} sequences go on at a time")
    longest = min(len(request.prompt) + way.max_tokens, context)
    if way.beams > 1 and way.beams * (longest // PAGE + 1) > num_pages:
        room = num_pages * PAGE
        raise Refused(
            "beams", f"{way.beams} beams of {longest} tokens need more room than the {room} tokens that there are"
        )


def _check_sampling(way: Sampling, vocab_size: int) -> None:
    least = {"max_tokens": 1, "min_tokens": 0, "temperature": 0, "top_k": 0, "no_repeat_ngram": 0, "beams": 1}
    for field, value in least.items():
        if not value <= getattr(way, field) < math.inf:
            raise Refused(field, f"is {getattr(way, field)}, and must be at least {value}")
    if not 0 < way.top_p <= 1:
        raise Refused("top_p", f"is {way.top_p}, and must be above 0 and at most 1")
    if not 0 <= way.min_p <= 1:
        raise Refused("min_p", f"is {way.min_p}, and must be between 0 and 1")
    if not 0 < way.repetition_penalty < math.inf:
        raise Refused("repetition_penalty", f"is {way.repetition_penalty}, and must be above 0")
    for field in ("presence_penalty", "frequency_penalty", "length_penalty"):
        if not math.isfinite(getattr(way, field)):
            raise Refused(field, f"is {getattr(way, field)}, and must be a number")
    if way.seed is not None and not 0 <= way.seed < _LARGEST_SEED:
        raise Refused("seed", f"is {way.seed}, and must be at least 0 and below 2^63")
    if way.logprobs is not None and not 0 <= way.logprobs <= vocab_size:
        raise Refused("logprobs", f"is {way.logprobs}, and must be between 0 and {vocab_size}")
    if any(math.isnan(added) for _, added in way.bias):
        raise Refused("bias", "must be numbers")
    _in_vocabulary("bias", [token for token, _ in way.bias], vocab_size)
    _in_vocabulary("stop_ids", way.stop_ids, vocab_size)
    if way.beams > 1 and way.temperature > 0:
        raise Refused("beams", "beam search takes the likeliest sequences: it goes with temperature 0 alone")
    if way.beams > 1 and way.logprobs is not None:
        raise Refused("logprobs", "beam search gives no log-probabilities")


def _in_vocabulary(field: str, ids: tuple[int, ...] | list[int], vocab_size: int) -> None:
    strange = next((token for token in ids if not 0 <= token < vocab_size), None)
    if strange is not None:
        raise Refused(field, f"{strange} is no token: ids go from 0 to {vocab_size - 1}")
