"""One way to decode, in a process of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from launcher.activation import Keep
from launcher.attention import Sdpa
from launcher.benchmarks.carried import unpacked
from launcher.benchmarks.decoding_peer import decode_by_peer
from launcher.benchmarks.decoding_ways import WAYS, now
from launcher.engines.distributed import DTYPES, choose_device
from launcher.models.build import build_model
from launcher.quantization.bytes import own_tensors
from launcher.quantization.methods import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_BYTES = 2**30
_TIMES = 5


def read_bandwidth(*, progress: Callable[[], None]) -> dict[str, Any]:
    """Return how fast memory is read: the best of several sums over a GiB, on all threads or the GPU."""
    device = choose_device(0)
    numbers = torch.ones(_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(_TIMES + 1):
        started = now(device)
        numbers.sum()
        best = min(best, now(device) - started)
        progress()
    return {"bytes_per_s": _BYTES / best}


def decode(
    *,
    model: dict[str, Any],
    weights: str,
    how: str,
    rest: str,
    seed: int,
    batch: int,
    prompt: int,
    tokens: int,
    warmup: int,
    rank: int,
    peer: list[str | None],
    progress: Callable[[], None],
) -> dict[str, Any]:
    """Continue prompts greedily and return seconds a step, prompt tokens a second, and what was read.

    Args:
        model: the run's, packed.
        weights: a format, or a method to quantise by.
        how: one of ``WAYS``, or the peer.
        rest: format of what is not quantised.
        seed: of random weights.
        batch: sequences at a time.
        prompt: tokens that each begins with.
        tokens: that each is continued by.
        warmup: whole runs before the one that counts.
        rank: number of the GPU.
        peer: interpreter and folder of CTranslate2.
        progress: called from time to time.
    """
    if how == "ctranslate2":
        python, folder = peer
        assert python is not None, "refused before anything starts"
        assert folder is not None, "refused before anything starts"
        return decode_by_peer(python, folder, batch=batch, prompt=prompt, tokens=tokens, warmup=warmup)
    device = choose_device(rank)
    built = build_model(
        unpacked(model),
        seed=seed,
        attention=Sdpa(),
        activation=Keep(),
        dtype=DTYPES[rest],
        quantization=METHODS[weights]() if weights in METHODS else None,
        after=lambda _, part: part.to(device),
        beat=progress,
    )
    built.eval().requires_grad_(False).to(device)
    read = weights_read(built)
    vocabulary = built.config.get_text_config().vocab_size
    ids = ((torch.arange(batch * prompt).view(batch, prompt) * 7 + 11) % vocabulary).to(device)
    way = WAYS[how](built, batch=batch, length=prompt + tokens + 2)
    first = 0.0
    for number in range(warmup + 1):
        timed = way.go(ids, tokens, progress)
        first = timed["first_s"] if number == 0 else first
    digest = hashlib.sha256(repr(timed["chosen"]).encode()).hexdigest()[:16]
    return {
        "token_s": timed["decode_s"] / tokens,
        "prefill_per_s": batch * prompt / timed["prefill_s"],
        "first_s": first,
        "read_bytes": read,
        "digest": digest,
    }


def weights_read(model: PreTrainedModel) -> int:
    """Return the bytes that a step reads at least: all weights, of the embedding only where it is the head too."""
    table, seen, total = model.get_input_embeddings(), set[int](), 0
    is_tied = model.get_output_embeddings().weight is table.weight
    for module in model.modules():
        if module is table and not is_tied:
            continue
        for _, tensor in own_tensors(module):
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += tensor.nbytes
    return total
