"""From a body to how its tokens are chosen."""

from __future__ import annotations

import hashlib

from launcher.serving.api.bodies import ChatBody, CompletionBody, Generating
from launcher.serving.api.problems import FIELDS, invalid
from launcher.serving.ranges import out_of_range
from launcher.serving.values import Sampling


def sampling_of(body: Generating, *, max_tokens: int, vocab_size: int) -> Sampling:
    """Return the sampling of choice 0.

    Raises:
        ApiError: fields that contradict each other, or the vocabulary.
    """
    if body.stream_options is not None and not body.stream:
        raise invalid("is for streams; set stream", "stream_options")
    if body.min_tokens > max_tokens:
        raise invalid(f"is above max_tokens={max_tokens}", "min_tokens")
    temperature = body.temperature if body.temperature is not None else 0.0 if body.num_beams > 1 else 1.0
    sampling = Sampling(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        no_repeat_ngram=body.no_repeat_ngram_size,
        bias=_bias(body, vocab_size),
        stop_ids=tuple(body.stop_token_ids),
        ignore_end=body.ignore_eos,
        seed=None if body.seed is None else body.seed % 2**63,
        logprobs=_logprobs(body),
        beams=body.num_beams,
        length_penalty=body.length_penalty,
    )
    for field, why, _ in out_of_range(sampling):
        value = getattr(sampling, field)
        said = why if isinstance(value, tuple) else f"is {value}: {why}"
        raise invalid(said, FIELDS.get(field, field), code="invalid_value")
    return sampling


def seed_of(seed: int | None, choice: int) -> int | None:
    """Return the seed of one of ``n`` choices: the first has the request's own, each other one of its own."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63


def _logprobs(body: Generating) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    assert isinstance(body, ChatBody)
    if body.top_logprobs and not body.logprobs:
        raise invalid("needs logprobs=true", "top_logprobs")
    return body.top_logprobs if body.logprobs else None


def _bias(body: Generating, vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = []
    for name, value in body.logit_bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            raise invalid(f"{name[:20]!r} is no token of this model (0 to {vocab_size - 1})", "logit_bias")
        pairs.append((int(name), value))
    return tuple(sorted(pairs))
