"""Which requests can never be served, told before they are queued."""

from __future__ import annotations

from collections.abc import Container

from launcher.serving.pages import PAGE
from launcher.serving.ranges import out_of_range
from launcher.serving.values import Refused, Request, Sampling


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
    for field, why, _ in out_of_range(way):
        value = getattr(way, field)
        raise Refused(field, why if isinstance(value, tuple) else f"is {value}: {why}")
    _in_vocabulary("bias", [token for token, _ in way.bias], vocab_size)
    _in_vocabulary("stop_ids", way.stop_ids, vocab_size)


def _in_vocabulary(field: str, ids: tuple[int, ...] | list[int], vocab_size: int) -> None:
    strange = next((token for token in ids if not 0 <= token < vocab_size), None)
    if strange is not None:
        raise Refused(field, f"{strange} is no token: ids go from 0 to {vocab_size - 1}")
