"""The work of ``job=quantize``: quantize and save a model, and compare it with the original."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from launcher.benchmarks.quantization_report import AFTER, BEFORE, Fidelity, QuantizationReport, compare_models
from launcher.benchmarks.results import describe_machine
from launcher.config.activation import NoCheckpointing
from launcher.config.inference import EngineLimits
from launcher.config.model.folder import weight_bytes
from launcher.config.quantization import Int4Weight, Quantization
from launcher.config.sampling import SamplingParams
from launcher.config.sparsity import SPARSITY_FILE
from launcher.data.dataloader import Loader, MicroBatch
from launcher.data.dataset import Splits, open_splits
from launcher.engines.distributed import DTYPES, choose_device
from launcher.engines.model import prepare_precision, weights_progress
from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.model_loader import load_eos_token_ids
from launcher.inference.engine.model_runner import cache_argument
from launcher.inference.engine.paged_engine import paged_engine_for
from launcher.inference.kernels.layers import replace_quantized_layers
from launcher.inference.tokenizer import open_tokenizer
from launcher.models.build import build_model
from launcher.models.pretrained import weights_folder
from launcher.models.tokenizer import copy_tokenizer
from launcher.protocol.metrics import MetricsWriter
from launcher.quantization.codecs import quantized_layers
from launcher.quantization.folder import save_quantized
from launcher.quantization.layers import bf16_bytes, bytes_by_group
from launcher.utils.files import write_atomic, write_json
from launcher.utils.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.config.job.compression import CompressionJob
    from launcher.config.job.quantize import Quantize
    from launcher.engines.context import Context
    from launcher.inference.engine.paged_engine import PagedEngine


Rates = dict[str, float]
"""``prefill_per_s`` and ``decode_per_s``, in tokens of all sequences together."""


def forward_rates(model: PreTrainedModel, *, batch: int, prompt: int, new: int) -> Rates:
    """Return the rates of plain forward passes: of the prompts, then of each further token.

    Args:
        model: in inference mode.
        batch: sequences at a time.
        prompt: tokens that each begins with.
        new: tokens that each is continued by.
    """
    ids = _prompts(model, batch=batch, prompt=prompt)
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        started = _now(model)
        kept: dict[str, Any] = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
        last = model(ids, **kept).logits[:, -1:].argmax(-1)
        read = _now(model)
        for _ in range(new):
            last = model(last, **kept).logits[:, -1:].argmax(-1)
        ended = _now(model)
    return {"prefill_per_s": batch * prompt / (read - started), "decode_per_s": batch * new / (ended - read)}


def engine_of(model: PreTrainedModel, *, batch: int, prompt: int, new: int) -> PagedEngine:
    """Return the launcher's engine around a model, whose layers it may replace."""
    limits = EngineLimits(
        max_num_seqs=batch,
        enable_prefix_caching=False,
        kv_cache_tokens=batch * (prompt + new + 64),
        prefill_chunk_size=batch * prompt,
    )
    return paged_engine_for(model, limits=limits, eos_token_ids=())


def engine_rates(engine: PagedEngine, model: PreTrainedModel, *, batch: int, prompt: int, new: int) -> Rates:
    """Return how fast the engine is with as many requests as ``batch`` at a time."""
    ids = _prompts(model, batch=batch, prompt=prompt).tolist()
    sampling = SamplingParams(max_tokens=new + 1, ignore_eos=True)
    for number, row in enumerate(ids):
        engine.add(EngineRequest(id=str(number), prompt=tuple(row), sampling=sampling))
    started = _now(model)
    engine.step()
    read = _now(model)
    while not engine.idle:
        engine.step()
    ended = _now(model)
    return {"prefill_per_s": batch * prompt / (read - started), "decode_per_s": batch * new / (ended - read)}


def _prompts(model: PreTrainedModel, *, batch: int, prompt: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    numbers = torch.arange(batch * prompt).view(batch, prompt)
    return ((numbers * 7 + 11) % vocabulary).to(model.device)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def quantize_model(job: Quantize, context: Context) -> None:
    """Do all of it on this rank, and leave weights, report and metrics."""
    run = context.run
    heartbeat = context.heartbeat.update
    method = run.quantization
    assert isinstance(method, Quantization), "refused before anything starts"
    models = {name: build_model_of(context, how) for name, how in ((BEFORE, None), (AFTER, method))}
    before, after = models[BEFORE], models[AFTER]
    names = {name for name, _ in quantized_layers(after)}
    print(f"{len(names)} layers quantized by {method.kind}", flush=True)
    heartbeat("save", 1, steps=job.num_steps(run, world_size=1))
    folder = job.folder(context.run_dir)
    source = weights_folder(run.model, heartbeat=lambda: heartbeat("save"))
    if source is not None and (source / SPARSITY_FILE).is_file() and isinstance(method, Int4Weight):
        print(f"zeros: {source} is pruned, and int4_weight does not keep zeros: int8_weight does", flush=True)
    disk = _save(after, method, folder, source=source, context=context)
    heartbeat("compare", 2)
    fidelity = _compare(job, context, before, after)
    heartbeat("measure", 3)
    forward = _rates(job, lambda which, batch: forward_rates(models[which], **rate_sizes(job, batch)), context)
    sizes = {name: bytes_by_group(model, names) for name, model in models.items()}
    matrices = bf16_bytes(before, names)
    engine, samples = _by_engine(job, context, models)
    heartbeat("done", job.num_steps(run, world_size=1))
    found = QuantizationReport(
        model=run.model.name,
        method=method,
        precision=run.precision.kind,
        layers=len(names),
        memory=sizes,
        matrices_bf16=matrices,
        disk=disk,
        fidelity=fidelity,
        forward=forward,
        engine=engine,
        prompt=job.prompt,
        samples=samples,
    )
    _publish(found, context, folder)


def build_model_of(context: Context, method: Quantization | None = None) -> PreTrainedModel:
    """Return the model of a run in inference mode, quantized by ``method``."""
    run = context.run
    device = choose_device(context.local_rank)
    prepare_precision(run.precision, device=device)
    model = build_model(
        run.model,
        seed=run.job.seed,
        attention=run.attention,
        activation=NoCheckpointing(),
        dtype=DTYPES[run.precision.compute],
        quantization=method,
        after=lambda _, part: part.to(device),
        heartbeat=lambda: context.heartbeat.update("build"),
        on_progress=weights_progress(context),
    )
    return model.eval().requires_grad_(False).to(device)


def _save(
    model: PreTrainedModel, method: Quantization, folder: Path, *, source: Path | None, context: Context
) -> dict[str, int]:
    """Save the folder under a temporary name first; return weight bytes before and after."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.incomplete")
    making.mkdir()
    try:
        save_quantized(model, method, making)
        if source is None:
            print("weights are random, so no tokenizer is put beside them", flush=True)
        else:
            copy_tokenizer(source, making)
        for file in making.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        making.rename(folder)  # onto nothing, or onto an empty folder: the kernel refuses any other
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    print(f"weights: {folder}", flush=True)
    found = {AFTER: weight_bytes(folder)}
    if source is not None:
        found[BEFORE] = weight_bytes(source)
    return found


def _compare(job: Quantize, context: Context, before: PreTrainedModel, after: PreTrainedModel) -> Fidelity:
    run, heartbeat = context.run, context.heartbeat.update
    splits = open_splits(
        run.data, run.model, sequence_length=job.sequence_length, seed=job.seed, heartbeat=lambda: heartbeat("load")
    )
    batches = held_out_batches(job, context, splits)
    swapped = replace_quantized_layers(
        after, after.dtype, heartbeat=lambda: heartbeat("compare", 2)
    )  # many times faster on a CPU
    if swapped.what:
        print(f"comparison: {swapped.what}", flush=True)
    found = compare_models(before, after, batches, heartbeat=lambda: heartbeat("compare", 2))
    swapped.undo()
    return found


def held_out_batches(job: CompressionJob, context: Context, splits: Splits) -> Iterator[MicroBatch]:
    """Yield the text that two models are compared on."""
    loader = Loader(splits, context.batch, seed=job.seed, rank=0)
    return (batch for step in loader.held_out(job.eval_sequences) for batch in step)


def rate_sizes(job: CompressionJob, batch: int) -> dict[str, int]:
    """Return what the speed of ``batch`` sequences at a time is measured with."""
    return {"batch": batch, "prompt": job.rate_prompt, "new": job.rate_tokens}


SLOW_S = 20.0
"""A round of both that takes longer needs no warming up."""
Measured = dict[int, dict[str, list[Rates]]]
"""By batch, then before and after: one entry a round."""


def _rates(job: Quantize, measure: Callable[[str, int], Rates], context: Context) -> Measured:
    """Measure both models in turn (A B A B), after a warm-up round."""
    found: Measured = {batch: {BEFORE: [], AFTER: []} for batch in job.rate_batches}
    for batch, rates in found.items():
        started = time.monotonic()
        warm_up = {which: _once(measure, which, batch, context) for which in rates}
        if (took_s := time.monotonic() - started) > SLOW_S:
            print(f"speed of {counted(batch, 'sequence')}: measured once, because it took {took_s:.0f} s", flush=True)
            for which, kept in rates.items():
                kept.append(warm_up[which])
            continue
        for _ in range(job.repeats):
            for which, kept in rates.items():
                kept.append(_once(measure, which, batch, context))
    return found


def _once(measure: Callable[[str, int], Rates], which: str, batch: int, context: Context) -> Rates:
    taken = measure(which, batch)
    context.heartbeat.update("measure", 3)
    return taken


def _by_engine(
    job: Quantize, context: Context, models: Mapping[str, PreTrainedModel]
) -> tuple[Measured, dict[str, str]]:
    """Return both models' rates under the launcher's engine, and their texts.

    Layers of the models are replaced.
    """
    most = max(job.rate_batches, default=1)
    engines = {which: engine_of(model, **rate_sizes(job, most)) for which, model in models.items()}
    tokenizer = open_tokenizer(job.tokenizer, context.run, heartbeat=lambda: context.heartbeat.update("sample", 4))

    def measure(which: str, batch: int) -> Rates:
        return engine_rates(engines[which], models[which], **rate_sizes(job, batch))

    rates = _rates(job, measure, context)
    eos_token_ids = load_eos_token_ids(context.run, models[BEFORE])
    samples = {
        which: tokenizer.decode(continue_prompt(engine, tokenizer.encode(job.prompt), eos_token_ids, job.sample_tokens))
        for which, engine in engines.items()
    }
    for engine in engines.values():
        engine.close()
    return rates, samples


def continue_prompt(
    engine: PagedEngine, prompt: list[int], eos_token_ids: tuple[int, ...], max_tokens: int
) -> list[int]:
    """Return the tokens by which an engine continues a prompt, greedily."""
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=eos_token_ids)
    engine.add(EngineRequest(id="sample", prompt=tuple(prompt), sampling=sampling))
    tokens: list[int] = []
    while not engine.idle:
        for output in engine.step():
            tokens += (token.id for token in output.tokens)
    return tokens


def _publish(found: QuantizationReport, context: Context, folder: Path) -> None:
    machine = describe_machine()
    tree: dict[str, Any] = {**found.tree(), "machine": machine, "folder": str(folder)}
    text = "\n".join(found.markdown(machine)) + "\n"
    write_json(context.run_dir.path / "quantize.json", tree)
    write_atomic(context.run_dir.path / "quantize.md", text)
    with MetricsWriter(context.run_dir.metrics) as metrics:
        metrics.record(0, **{f"quantize/{name}": value for name, value in found.metrics().items()})
    print(text, flush=True)
    print(f"report: {context.run_dir.path / 'quantize.md'} and .json", flush=True)
