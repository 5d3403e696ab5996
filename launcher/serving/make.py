"""From a run to its generation engine, on a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil
import torch
from transformers import GenerationConfig

from launcher.activation import Keep
from launcher.errors import ConfigError
from launcher.models.build import build_model
from launcher.serving.base import Generator
from launcher.serving.engine import Slots
from launcher.serving.holds import Sample
from launcher.serving.kernels.apply import apply_native
from launcher.serving.kv import PagedCache
from launcher.serving.pages import PAGE
from launcher.serving.runner import Runner
from launcher.serving.shapes import Shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.config import Run
    from launcher.serving.limits import Limits

_SHARE_OF_FREE = 4
"""Keys and values take at most one part in this many of the memory that is free at the start, unless told otherwise."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_generator(
    run: Run, *, limits: Limits, rank: int, world_size: int, beat: Callable[[], None], local_rank: int = 0
) -> Generator:
    """Return the engine of one rank, with its model built and checked.

    Args:
        run: what to build, and how it is computed.
        limits: how much at a time.
        rank: of this process.
        world_size: processes that hold the model between them; 1 where each holds it whole.
        beat: called while the model is built.
        local_rank: index of its device on this machine.

    Raises:
        ConfigError: the engine cannot hold this model exactly, or cannot serve it with the rest of the run.
        EnvironmentProblem: weights cannot be fetched.
    """
    if world_size != 1:
        why = f"spreads no model over {world_size} ranks yet"
        raise ConfigError("job.engine", "slots", why=why, fix="parallel=single")
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    model = inference_model(run, device=device, beat=beat)
    return slots_of(model, limits=limits, ends=ends_of(run, model, beat=beat), beat=beat)


def inference_model(run: Run, *, device: torch.device, beat: Callable[[], None] = lambda: None) -> PreTrainedModel:
    """Return the model of a run, whole, in inference mode and in the format of the run."""
    model = build_model(
        run.model,
        seed=run.job.seed,
        attention=run.attention,
        activation=Keep(),
        dtype=_DTYPES[run.precision.compute],
        beat=beat,
    )
    return model.eval().requires_grad_(False).to(device)


def ends_of(run: Run, model: PreTrainedModel, *, beat: Callable[[], None] = lambda: None) -> tuple[int, ...]:
    """Return the end-of-sequence tokens: those of the weights' own generation config, else of the model's config."""
    folder = run.model.weights_folder(beat=beat)
    config = model.generation_config
    if folder is not None and (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder)
    ends = config.eos_token_id
    return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)


def slots_of(
    model: PreTrainedModel,
    *,
    limits: Limits,
    ends: tuple[int, ...],
    kernels: bool = True,
    beat: Callable[[], None] = lambda: None,
) -> Slots:
    """Return the launcher's own engine around a model.

    Args:
        model: whole, in inference mode; its layers may be replaced.
        limits: how much at a time.
        ends: tokens that end a sequence.
        kernels: whether layers are replaced by compiled ones where there are any.
        beat: called meanwhile.

    Raises:
        ConfigError: it cannot hold the model exactly.
    """
    sample = Sample(model)
    sample.use_pages(model)
    config = model.config.get_text_config()
    num_pages = _num_pages(limits, sample.shapes, context=config.max_position_embeddings, device=model.device)
    cache = PagedCache(sample.shapes, num_pages=num_pages, dtype=model.dtype, device=model.device)
    runner = Runner(model, cache)
    if kernels:
        swapped = apply_native(model, cache, beat=beat)
        difference = sample.difference(runner)
        if not difference <= sample.tolerance(model):
            swapped.undo()
            cache.kernels = None
            swapped.what = f"the model's own layers: compiled ones differ by {difference:.2g} of its largest score"
        print(f"engine: {swapped.what}", flush=True)
    return Slots(
        runner,
        limits=limits,
        num_pages=num_pages,
        context=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        ends=ends,
    )


def _num_pages(limits: Limits, shapes: Shapes, *, context: int, device: torch.device) -> int:
    if limits.kv_tokens is not None:
        return max(1, limits.kv_tokens // PAGE)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    affordable = free // _SHARE_OF_FREE // (shapes.token_bytes * PAGE)
    return max(1, min(limits.max_requests * -(-context // PAGE), affordable))
