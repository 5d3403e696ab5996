"""The work of ``job=sparsify``: prune and save a model, and compare it with the original.

One model is in memory at a time. The original's speed is measured first, and the model is loaded again to be pruned.
Of the original's answers to the held-out text the inputs of the output head are kept, which pruning does not change.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from launcher.benchmarks.quantization_report import (
    AFTER,
    BEFORE,
    Fidelity,
    LogitPair,
    compare_logits,
    model_logits,
)
from launcher.benchmarks.quantize import (
    SLOW_S,
    Rates,
    build_model_of,
    continue_prompt,
    engine_of,
    engine_rates,
    held_out_batches,
    rate_sizes,
)
from launcher.benchmarks.results import describe_machine
from launcher.benchmarks.sparsity_report import PrunedMatrix, SparsityReport
from launcher.config.export import ExportOptions
from launcher.config.model.folder import weight_bytes
from launcher.config.sparsity import CalibratedPruning, Pruning, write_sparsity_manifest
from launcher.data.dataloader import MicroBatch
from launcher.data.dataset import Splits, open_splits
from launcher.inference.engine.model_loader import load_eos_token_ids
from launcher.inference.tokenizer import open_tokenizer
from launcher.models.build import skeleton
from launcher.models.export import ModelExport, write_folder
from launcher.models.pretrained import weights_folder
from launcher.models.weights import BuiltTensors
from launcher.protocol.metrics import MetricsWriter
from launcher.quantization.layers import matrix_size, own_tensors
from launcher.sparsity.prune import CalibrationBatch, prune_model, targets, zero_share
from launcher.utils.files import write_atomic, write_json
from launcher.utils.heap import trim_heap
from launcher.utils.text import counted

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from launcher.config.job.sparsify import Sparsify
    from launcher.engines.context import Context


def sparsify_model(job: Sparsify, context: Context) -> None:
    """Do all of it on this rank, and leave weights, report and metrics."""
    run, heartbeat = context.run, context.heartbeat.update
    method = run.sparsity
    assert isinstance(method, Pruning), "refused before anything starts"
    targets(skeleton(run.model, attention=run.attention), method)  # what does not fit is refused before the work
    splits = open_splits(
        run.data, run.model, sequence_length=job.sequence_length, seed=job.seed, heartbeat=lambda: heartbeat("load")
    )
    batches = calibration_batches(method, job, splits) if isinstance(method, CalibratedPruning) else []
    rates, samples = {}, {}
    rates[BEFORE], samples[BEFORE] = _by_engine(job, context, build_model_of(context), stage="original")
    _free()
    heartbeat("build", 1, steps=job.num_steps(run, world_size=1))
    model = build_model_of(context)
    layers = targets(model, method)
    zeros = {name: zero_share(layer) for name, layer in layers.items()}
    head_inputs = _head_inputs(model, held_out_batches(job, context, splits), context)
    heartbeat("calibrate", 2)
    started = time.monotonic()
    found = prune_model(model, method, batches, heartbeat=lambda: heartbeat("calibrate", 2), say=_say)
    pruned_s = time.monotonic() - started
    heartbeat("save", 3)
    folder = job.folder(context.run_dir)
    disk = _save(model, method, folder, found, context)
    heartbeat("compare", 4)
    fidelity = _compare(model, held_out_batches(job, context, splits), head_inputs, context)
    matrices = {
        name: PrunedMatrix(size=matrix_size(layer), zeros_before=zeros[name], zeros_after=found[name])
        for name, layer in layers.items()
    }
    memory, size = _memory(model), next(iter(layers.values())).weight.element_size()
    del layers, head_inputs  # the engine replaces layers, whose matrices would stay beside the packed ones
    rates[AFTER], samples[AFTER] = _by_engine(job, context, model, stage="measure")
    heartbeat("done", job.num_steps(run, world_size=1))
    report = SparsityReport(
        model=run.model.name,
        method=method,
        precision=run.precision.kind,
        calibration_tokens=sum(batch.input_ids.numel() for batch in batches),
        matrices=matrices,
        weight_bytes=size,
        memory=memory,
        disk=disk,
        fidelity=fidelity,
        engine=rates,
        prompt=job.prompt,
        samples=samples,
        pruned_s=pruned_s,
    )
    _publish(report, context, folder)


def _say(line: str) -> None:
    print(line, flush=True)


def _free() -> None:
    gc.collect()
    trim_heap()


def calibration_batches(method: CalibratedPruning, job: Sparsify, splits: Splits) -> list[CalibrationBatch]:
    """Return the first training sequences of a run, in batches of one length, without padding."""
    count = min(method.calibration_sequences, splits.train.num_sequences)
    if count < method.calibration_sequences:
        print(f"calibration: the data has {counted(count, 'training sequence')}, which are all taken", flush=True)
    rows = [splits.train.row(splits.train_order.index(job.seed, at)) for at in range(count)]
    by_length: dict[int, list[Any]] = {}
    for row in rows:
        by_length.setdefault(len(row.input_ids), []).append(row)
    batches = []
    for length, same in sorted(by_length.items()):
        for start in range(0, len(same), job.micro_batch):
            part = same[start : start + job.micro_batch]
            ids = torch.from_numpy(np.stack([row.input_ids for row in part]))
            batches.append(CalibrationBatch(input_ids=ids, position_ids=_positions(part, length)))
    return batches


def _positions(rows: Sequence[Any], length: int) -> Tensor | None:
    if all(row.position_ids is None for row in rows):
        return None
    plain = np.arange(length)
    return torch.from_numpy(np.stack([plain if row.position_ids is None else row.position_ids for row in rows]))


def _by_engine(
    job: Sparsify, context: Context, model: PreTrainedModel, *, stage: str
) -> tuple[dict[int, list[Rates]], str]:
    """Return a model's rates under the launcher's engine, and its text; its layers are replaced."""
    engine = engine_of(model, **rate_sizes(job, max(job.rate_batches, default=1)))
    tokenizer = open_tokenizer(job.tokenizer, context.run, heartbeat=lambda: context.heartbeat.update(stage))
    found: dict[int, list[Rates]] = {}

    def measure(batch: int) -> Rates:
        taken = engine_rates(engine, model, **rate_sizes(job, batch))
        context.heartbeat.update(stage)
        return taken

    for batch in job.rate_batches:
        started = time.monotonic()
        warm_up = measure(batch)
        if (took_s := time.monotonic() - started) > SLOW_S / 2:
            print(f"speed of {counted(batch, 'sequence')}: measured once, because it took {took_s:.0f} s", flush=True)
            found[batch] = [warm_up]
        else:
            found[batch] = [measure(batch) for _ in range(job.repeats)]
    eos_token_ids = load_eos_token_ids(context.run, model)
    tokens = continue_prompt(engine, tokenizer.encode(job.prompt), eos_token_ids, job.sample_tokens)
    engine.close()
    return found, tokenizer.decode(tokens)


def _head_inputs(model: PreTrainedModel, batches: Iterator[MicroBatch], context: Context) -> list[Tensor]:
    """Return what the output head of a model gets for each batch."""
    kept: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(args[0])

    hook = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        with torch.inference_mode():
            for batch in batches:
                model_logits(model, batch)
                context.heartbeat.update("calibrate", 1)
    finally:
        hook.remove()
    return kept


def _compare(
    model: PreTrainedModel, batches: Iterator[MicroBatch], head_inputs: Sequence[Tensor], context: Context
) -> Fidelity:
    """Compare a pruned model with its original, of which the inputs of the output head are left."""
    coming = iter(head_inputs)

    def both(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.cat((next(coming), args[0])), *args[1:])

    def pairs() -> Iterator[LogitPair]:
        for batch in batches:
            before, after = model_logits(model, batch).chunk(2)
            context.heartbeat.update("compare", 4)
            yield before, after, batch

    hook = model.get_output_embeddings().register_forward_pre_hook(both)
    try:
        with torch.inference_mode():
            return compare_logits(pairs())
    finally:
        hook.remove()


def _save(
    model: PreTrainedModel, method: Pruning, folder: Path, zeros: dict[str, float], context: Context
) -> dict[str, int]:
    """Write the folder; return weight bytes before and after."""
    source = weights_folder(context.run.model, heartbeat=lambda: context.heartbeat.update("save", 3))
    if source is None:
        print("weights are random, so no tokenizer is put beside them", flush=True)
    export = ModelExport(
        source,
        dtype=model.dtype,
        max_shard_bytes=ExportOptions().max_shard_bytes,
        stored=BuiltTensors(model),
        config=model.config,
    )

    def fill(making: Path) -> None:
        export.fill(making, written=lambda num_bytes: context.heartbeat.update("save", 3))
        write_sparsity_manifest(making, method, zeros)

    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir():
        folder.rmdir()  # empty, as the plan has made sure
    write_folder(folder, fill)
    print(f"weights: {folder}", flush=True)
    found = {AFTER: weight_bytes(folder)}
    if source is not None:
        found[BEFORE] = weight_bytes(source)
    return found


def _memory(model: PreTrainedModel) -> int:
    """Return the bytes of a model's tensors; those that are shared count once."""
    found = {tensor.data_ptr(): tensor.nbytes for module in model.modules() for _, tensor in own_tensors(module)}
    return sum(found.values())


def _publish(found: SparsityReport, context: Context, folder: Path) -> None:
    machine = describe_machine()
    tree: dict[str, Any] = {**found.tree(), "machine": machine, "folder": str(folder)}
    text = "\n".join(found.markdown(machine)) + "\n"
    write_json(context.run_dir.path / "sparsify.json", tree)
    write_atomic(context.run_dir.path / "sparsify.md", text)
    with MetricsWriter(context.run_dir.metrics) as metrics:
        metrics.record(0, **{f"sparsify/{name}": value for name, value in found.metrics().items()})
    print(text, flush=True)
    print(f"report: {context.run_dir.path / 'sparsify.md'} and .json", flush=True)
