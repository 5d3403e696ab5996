"""Ways to continue prompts greedily: the same model, the same tokens, other machinery."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo import config as dynamo
from transformers import DynamicCache, StaticCache

from launcher.compile import quote_torch_libraries
from launcher.models.compiled import repeated_blocks
from launcher.serving.limits import Limits
from launcher.serving.make import slots_of
from launcher.serving.runner import cache_name
from launcher.serving.values import Request, Sampling

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin


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
            started = now(device)
            kept: dict[str, Any] = {cache_name(self._model): cache, "use_cache": True}
            last = self._model(ids, logits_to_keep=1, **kept).logits[:, -1:].argmax(-1)
            read = now(device)
            first = read
            for number in range(tokens + 1):
                at = torch.full((1, 1), ids.shape[1] + number, device=device)
                last = step(last, position_ids=at, **kept).logits[:, -1:].argmax(-1)
                chosen.append(last)
                if number == 0:
                    first = now(device)
                progress()
            ended = now(device)
        picked = torch.cat(chosen, dim=1).tolist()
        return {"prefill_s": read - started, "first_s": first - read, "decode_s": ended - first, "chosen": picked}


class Compiled(Eager):
    """Single tokens go through a compiled forward pass with a cache of fixed size."""

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        super().__init__(model, batch=batch, length=length)
        self._length = length
        quote_torch_libraries()
        self._step = torch.compile(model.forward, dynamic=False)

    def _cache(self) -> Any:
        return StaticCache(config=self._model.config, max_cache_len=self._length)


class CompiledBlocks(Eager):
    """Blocks that share one compilation, with a cache of fixed size.

    One block is traced and compiled where :class:`Compiled` takes them all; each token pays for it with as many checks
    of what was compiled as there are blocks.
    """

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        super().__init__(model, batch=batch, length=length)
        self._length = length
        # The number of a block is read in it: as a constant it would make each another program.
        dynamo.allow_unspec_int_on_nn_module = True
        self._cache_is = cache_name(model)
        for number, block in enumerate(repeated_blocks(model)):
            block.forward = self._compiled(number, block)
        self._step = lambda *args, **options: model(*args, **options)

    def _cache(self) -> Any:
        return StaticCache(config=self._model.config, max_cache_len=self._length)

    def _compiled(self, number: int, block: Module) -> Callable[..., Any]:
        quote_torch_libraries()
        plain, compiled = block.forward, torch.compile(block.forward, dynamic=False, fullgraph=True)
        signature = inspect.signature(plain)

        def forward(*args: Any, **options: Any) -> Any:
            if args[0].shape[1] > 1:  # the prompt
                return plain(*args, **options)
            given = signature.bind(*args, **options)
            holder = given.arguments if self._cache_is in given.arguments else given.kwargs
            holder[self._cache_is] = _OwnLayer(holder[self._cache_is].layers[number])
            return compiled(*given.args, **given.kwargs)

        return forward


class _OwnLayer:
    """The cache of one block, which looks the same to each."""

    def __init__(self, layer: CacheLayerMixin) -> None:
        self._layer = layer

    def update(self, keys: Tensor, values: Tensor, _number: int, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Append, and return all; as ``Cache`` does."""
        both: tuple[Tensor, Tensor] = self._layer.update(keys, values, *args, **options)
        return both


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
        times = [now(ids.device)]
        while not self._engine.idle:
            for update in self._engine.step():
                chosen.setdefault(update.request, []).extend(token.id for token in update.tokens)
            times.append(now(ids.device))
            progress()
        picked = [chosen[key][1:] for key in sorted(chosen, key=int)]
        started, read, first, *rest = times
        return {"prefill_s": read - started, "first_s": first - read, "decode_s": rest[-1] - first, "chosen": picked}


WAYS: Mapping[str, type[Eager | ByEngine]] = {
    "eager": Eager,
    "compiled": Compiled,
    "blocks": CompiledBlocks,
    "engine": ByEngine,
}


def now(device: torch.device) -> float:
    """Return seconds, once the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
