"""Timed greedy decoding in several ways, and memory bandwidth, in separate processes."""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo import config as dynamo
from transformers import DynamicCache, StaticCache

from launcher.benchmarks.isolated import unpack_component
from launcher.config.activation import NoCheckpointing
from launcher.config.attention import SdpaAttention
from launcher.config.inference import EngineLimits
from launcher.config.quantization import METHODS
from launcher.config.sampling import SamplingParams
from launcher.engines.distributed import DTYPES, choose_device
from launcher.errors import JobError
from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.model_runner import cache_argument
from launcher.inference.engine.paged_engine import paged_engine_for
from launcher.models.build import build_model
from launcher.models.transforms import repeated_blocks
from launcher.quantization.layers import own_tensors
from launcher.utils.build_cache import quote_torch_library_path

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin


class EagerDecoding:
    """Plain forward passes with a cache that grows."""

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        self._model, self._step = model, model

    def _cache(self) -> Any:
        return DynamicCache(config=self._model.config)

    def decode(self, ids: Tensor, tokens: int, progress: Callable[[], None]) -> dict[str, Any]:
        """Return seconds, and the tokens chosen."""
        device, step, cache = ids.device, self._step, self._cache()
        chosen = []
        with torch.inference_mode() if step is self._model else torch.no_grad():
            started = synchronized_time(device)
            kept: dict[str, Any] = {cache_argument(self._model): cache, "use_cache": True}
            last = self._model(ids, logits_to_keep=1, **kept).logits[:, -1:].argmax(-1)
            read = synchronized_time(device)
            first = read
            for number in range(tokens + 1):
                at = torch.full((1, 1), ids.shape[1] + number, device=device)
                last = step(last, position_ids=at, **kept).logits[:, -1:].argmax(-1)
                chosen.append(last)
                if number == 0:
                    first = synchronized_time(device)
                progress()
            ended = synchronized_time(device)
        picked = torch.cat(chosen, dim=1).tolist()
        return {"prefill_s": read - started, "first_s": first - read, "decode_s": ended - first, "chosen": picked}


class CompiledDecoding(EagerDecoding):
    """Single tokens go through a compiled forward pass with a cache of fixed size."""

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        super().__init__(model, batch=batch, length=length)
        self._length = length
        quote_torch_library_path()
        self._step = torch.compile(model.forward, dynamic=False)

    def _cache(self) -> Any:
        return StaticCache(config=self._model.config, max_cache_len=self._length)


class CompiledBlocksDecoding(EagerDecoding):
    """Blocks that share one compilation, with a cache of fixed size.

    One block is traced and compiled where :class:`Compiled` takes them all; each token pays for it with as many checks
    of what was compiled as there are blocks.
    """

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        super().__init__(model, batch=batch, length=length)
        self._length = length
        # The number of a block is read in it: as a constant it would make each another program.
        dynamo.allow_unspec_int_on_nn_module = True
        self._cache_is = cache_argument(model)
        for number, block in enumerate(repeated_blocks(model)):
            block.forward = self._compiled(number, block)
        self._step = lambda *args, **options: model(*args, **options)

    def _cache(self) -> Any:
        return StaticCache(config=self._model.config, max_cache_len=self._length)

    def _compiled(self, number: int, block: Module) -> Callable[..., Any]:
        quote_torch_library_path()
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


class EngineDecoding:
    """The launcher's own engine, as ``job=serve`` has it."""

    def __init__(self, model: PreTrainedModel, *, batch: int, length: int) -> None:
        limits = EngineLimits(
            max_num_seqs=batch,
            enable_prefix_caching=False,
            kv_cache_tokens=batch * (length + 64),
            prefill_chunk_size=batch * length,
        )
        self._engine = paged_engine_for(model, limits=limits, eos_token_ids=())

    def decode(self, ids: Tensor, tokens: int, progress: Callable[[], None]) -> dict[str, Any]:
        """Return seconds, and the tokens chosen."""
        sampling = SamplingParams(max_tokens=tokens + 2, ignore_eos=True)
        for number, row in enumerate(ids.tolist()):
            self._engine.add(EngineRequest(id=str(number), prompt=tuple(row), sampling=sampling))
        chosen: dict[str, list[int]] = {}
        times = [synchronized_time(ids.device)]
        while not self._engine.idle:
            for output in self._engine.step():
                chosen.setdefault(output.request_id, []).extend(token.id for token in output.tokens)
            times.append(synchronized_time(ids.device))
            progress()
        picked = [chosen[key][1:] for key in sorted(chosen, key=int)]
        started, read, first, *rest = times
        return {"prefill_s": read - started, "first_s": first - read, "decode_s": rest[-1] - first, "chosen": picked}


DECODINGS: Mapping[str, type[EagerDecoding | EngineDecoding]] = {
    "eager": EagerDecoding,
    "compiled": CompiledDecoding,
    "blocks": CompiledBlocksDecoding,
    "engine": EngineDecoding,
}


def synchronized_time(device: torch.device) -> float:
    """Return the time in seconds, once the GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


_PROGRAM = """
import json, sys, time
import ctranslate2

asked = json.load(sys.stdin)
generator = ctranslate2.Generator(asked["folder"], device="cpu", compute_type="int8", intra_threads=asked["threads"])
with open(asked["folder"] + "/vocabulary.json", encoding="utf-8") as file:
    vocabulary = json.load(file)
rows = [[vocabulary[(7 * (r * asked["prompt"] + k) + 11) % len(vocabulary)] for k in range(asked["prompt"])]
        for r in range(asked["batch"])]

def go(new):
    started = time.perf_counter()
    found = generator.generate_batch(rows, max_length=new, min_length=new, sampling_topk=1, beam_size=1,
                                     include_prompt_in_result=False, max_batch_size=0)
    return time.perf_counter() - started, [answer.sequences_ids[0] for answer in found]

for _ in range(asked["warmup"]):
    go(asked["tokens"] + 1)
one, _ = go(1)
all_, chosen = go(asked["tokens"] + 1)
print(json.dumps({"one": one, "all": all_, "chosen": chosen}))
"""


def decode_by_ctranslate2(
    python: str, folder: str, *, batch: int, prompt: int, tokens: int, warmup: int
) -> dict[str, Any]:
    """Return the same as :func:`decode`; its time is that of many tokens less that of one.

    Raises:
        JobError: it cannot be run.
    """
    import hashlib

    import torch

    where = Path(folder).expanduser()
    asked = {
        "folder": str(where),
        "threads": torch.get_num_threads(),
        "batch": batch,
        "prompt": prompt,
        "tokens": tokens,
        "warmup": max(1, warmup),
    }
    command = [str(Path(python).expanduser()), "-c", _PROGRAM]
    try:
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    except OSError as error:
        raise JobError(f"CTranslate2 cannot be started: {error}") from error
    if done.returncode:
        raise JobError(f"CTranslate2 ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "token_s": (found["all"] - found["one"]) / tokens,
        "prefill_per_s": batch * prompt / found["one"],
        "first_s": found["one"],
        "read_bytes": (where / "model.bin").stat().st_size,
        "digest": hashlib.sha256(repr(found["chosen"]).encode()).hexdigest()[:16],
    }


_BYTES = 2**30
_TIMES = 5


def read_bandwidth(*, progress: Callable[[], None]) -> dict[str, Any]:
    """Measure the memory read bandwidth: the best of several sums over one GiB.

    On all threads of the CPU, or on the GPU.
    """
    device = choose_device(0)
    numbers = torch.ones(_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(_TIMES + 1):
        started = synchronized_time(device)
        numbers.sum()
        best = min(best, synchronized_time(device) - started)
        progress()
    return {"bytes_per_s": _BYTES / best}


def decode(
    *,
    model: dict[str, Any],
    weights: str,
    how: str,
    rest: str,
    seed: int,
    batch_size: int,
    input_len: int,
    output_len: int,
    warmup: int,
    rank: int,
    peer: list[str | None],
    progress: Callable[[], None],
) -> dict[str, Any]:
    """Decode greedily; return seconds a step, prompt tokens a second and the bytes read.

    Args:
        model: the run's, packed.
        weights: a format, or a method to quantize by.
        how: one of ``DECODING_MODES``, or the peer.
        rest: format of what is not quantized.
        seed: of random weights.
        batch_size: sequences at a time.
        input_len: tokens that each begins with.
        output_len: tokens that each is continued by.
        warmup: whole runs before the one that counts.
        rank: number of the GPU.
        peer: interpreter and folder of CTranslate2.
        progress: called from time to time.
    """
    if how == "ctranslate2":
        python, folder = peer
        assert python is not None, "refused before anything starts"
        assert folder is not None, "refused before anything starts"
        return decode_by_ctranslate2(
            python, folder, batch=batch_size, prompt=input_len, tokens=output_len, warmup=warmup
        )
    device = choose_device(rank)
    built = build_model(
        unpack_component(model),
        seed=seed,
        attention=SdpaAttention(),
        activation=NoCheckpointing(),
        dtype=DTYPES[rest],
        quantization=METHODS[weights]() if weights in METHODS else None,
        after=lambda _, part: part.to(device),
        heartbeat=progress,
    )
    built.eval().requires_grad_(False).to(device)
    read = weights_read(built)
    vocabulary = built.config.get_text_config().vocab_size
    ids = ((torch.arange(batch_size * input_len).view(batch_size, input_len) * 7 + 11) % vocabulary).to(device)
    way = DECODINGS[how](built, batch=batch_size, length=input_len + output_len + 2)
    first = 0.0
    for number in range(warmup + 1):
        timed = way.decode(ids, output_len, progress)
        first = timed["first_s"] if number == 0 else first
    digest = hashlib.sha256(repr(timed["chosen"]).encode()).hexdigest()[:16]
    return {
        "token_s": timed["decode_s"] / output_len,
        "prefill_per_s": batch_size * input_len / timed["prefill_s"],
        "first_s": first,
        "read_bytes": read,
        "digest": digest,
    }


def weights_read(model: PreTrainedModel) -> int:
    """Return the least bytes a step reads: all weights, the embedding only if it is the head."""
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
