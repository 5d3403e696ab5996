"""One way to decode, in a process of its own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, StaticCache

from launcher.activation import Keep
from launcher.attention import Sdpa
from launcher.benchmarks.carried import unpacked
from launcher.benchmarks.decoding_peer import decode_by_peer
from launcher.engines.distributed import DTYPES, choose_device
from launcher.models.build import build_model
from launcher.quantization.bytes import own_tensors
from launcher.quantization.methods import METHODS
from launcher.serving.limits import Limits
from launcher.serving.make import slots_of
from launcher.serving.runner import cache_name
from launcher.serving.values import Request, Sampling

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


_BYTES = 2**30
_TIMES = 5


def read_bandwidth(*, progress: Callable[[], None]) -> dict[str, Any]:
    """Return how fast memory is read: the best of several sums over a GiB, on all threads or the GPU."""
    device = choose_device(0)
    numbers = torch.ones(_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(_TIMES + 1):
        started = _now(device)
        numbers.sum()
        best = min(best, _now(device) - started)
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
        how: ``eager``, ``compiled``, ``engine``, or the peer.
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
    ways: dict[str, type[Eager | ByEngine]] = {"eager": Eager, "compiled": Compiled, "engine": ByEngine}
    way = ways[how](built, batch=batch, length=prompt + tokens + 2)
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


class Eager:
    """Plain forward passes with a cache that grows."""

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        self._model, self._step = model, model

    def _cache(self) -> Any:
        return DynamicCache(config=self._model.config)

    def go(self, ids: Tensor, tokens: int, progress: Callable[[], None]) -> dict[str, Any]:
        """Return seconds, and the tokens chosen."""
        device, step, cache = ids.device, self._step, self._cache()
        chosen = []
        with torch.inference_mode() if step is self._model else torch.no_grad():
            started = _now(device)
            kept: dict[str, Any] = {cache_name(self._model): cache, "use_cache": True}
            last = self._model(ids, logits_to_keep=1, **kept).logits[:, -1:].argmax(-1)
            read = _now(device)
            first = read
            for number in range(tokens + 1):
                at = torch.full((1, 1), ids.shape[1] + number, device=device)
                last = step(last, position_ids=at, **kept).logits[:, -1:].argmax(-1)
                chosen.append(last)
                if number == 0:
                    first = _now(device)
                progress()
            ended = _now(device)
        picked = torch.cat(chosen, dim=1).tolist()
        return {"prefill_s": read - started, "first_s": first - read, "decode_s": ended - first, "chosen": picked}


class Compiled(Eager):
    """Single tokens go through a compiled forward pass with a cache of fixed size."""

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        super().__init__(model, batch=batch, length=length)
        self._length = length
        self._step = torch.compile(model.forward, dynamic=False)

    def _cache(self) -> Any:
        return StaticCache(config=self._model.config, max_cache_len=self._length)


class ByEngine:
    """The launcher's own engine, as ``job=serve`` has it."""

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        limits = Limits(
            max_requests=batch, prefix_cache=False, kv_tokens=batch * (length + 64), prefill_chunk=batch * length
        )
        self._engine = slots_of(model, limits=limits, ends=())

    def go(self, ids: Tensor, tokens: int, progress: Callable[[], None]) -> dict[str, Any]:
        """Return seconds, and the tokens chosen."""
        sampling = Sampling(max_tokens=tokens + 2, ignore_end=True)
        for number, row in enumerate(ids.tolist()):
            self._engine.add(Request(id=str(number), prompt=tuple(row), sampling=sampling))
        chosen: dict[str, list[int]] = {}
        times = [_now(ids.device)]
        while not self._engine.idle:
            for update in self._engine.step():
                chosen.setdefault(update.request, []).extend(token.id for token in update.tokens)
            times.append(_now(ids.device))
            progress()
        picked = [chosen[key][1:] for key in sorted(chosen, key=int)]
        started, read, first, *rest = times
        return {"prefill_s": read - started, "first_s": first - read, "decode_s": rest[-1] - first, "chosen": picked}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
