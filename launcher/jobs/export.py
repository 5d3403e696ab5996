"""The process of ``launch export``.

``python -m launcher.jobs.export SOURCE TARGET OPTIONS [RUN_YAML]``

``OPTIONS`` are those of the verb, as JSON. With ``RUN_YAML``, the snapshot of the run that trained an adapter, the
adapter is merged into that run's model.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.adapter_folder import is_adapter_folder
from launcher.config.export import GGUF, ONNX, SAFETENSORS, ExportOptions
from launcher.errors import LauncherError
from launcher.utils.logs import quiet_libraries
from launcher.utils.processes import die_with_parent
from launcher.utils.progress import ProgressLines, byte_progress
from launcher.utils.system import disk_full_message
from launcher.utils.text import bytes_text, counted

if TYPE_CHECKING:
    from launcher.models.export import ModelExport
    from launcher.models.weights import ModelTensors


def main() -> int:
    """Write the folder or file; print what it holds."""
    die_with_parent(os.getppid())
    quiet_libraries()
    source, target = map(Path, sys.argv[1:3])
    options = ExportOptions(**json.loads(sys.argv[3]))
    snapshot = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    try:
        if is_adapter_folder(source) and snapshot is None:
            _export_adapter(source, target, dtype=options.chosen_dtype)
        else:
            _export(source, target, options, snapshot)
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {disk_full_message(error, {'DIR': target.parent}) or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {target} was not written", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _export_adapter(source: Path, folder: Path, *, dtype: str) -> None:
    from launcher.engines.distributed import DTYPES
    from launcher.models.export import AdapterExport

    export = AdapterExport(source, dtype=DTYPES[dtype])
    export.write(folder)
    print(f"{export.num_params:,} parameters of an adapter, {dtype}, {bytes_text(export.num_bytes)}", flush=True)


def _merged(source: Path, snapshot: Path) -> ModelTensors:
    """Return the tensors of a run's model with the adapter of a checkpoint added to them."""
    from launcher.config.activation import NoCheckpointing
    from launcher.config.adapter_folder import AdapterUse, read_adapter_folder
    from launcher.config.snapshot import load_run
    from launcher.models.adapters import MergedModel
    from launcher.models.build import build_model

    run, found = load_run(snapshot), read_adapter_folder("run", str(source), use=AdapterUse.MODEL)
    model = replace(run.model, adapter=str(source))
    built = build_model(
        model,
        seed=run.job.seed,
        attention=run.attention,
        activation=NoCheckpointing(),
        adapter=found.lora,
        transforms=getattr(run.job, "transforms", ()),
        on_progress=ProgressLines("loading the weights").update,
    )
    merged = MergedModel(built.eval(), found.lora)
    if merged.num_dequantized:
        print(f"the weights of {merged.num_dequantized} quantized layers are dequantized, then merged", flush=True)
    return merged


def _dequantized(source: Path) -> ModelTensors | None:
    """Return the fp32 tensors of a folder of ``job=quantize``; ``None`` of any other."""
    from launcher.config.quantization import read_manifest

    manifest = read_manifest(source)
    if manifest is None:
        return None
    from transformers.pytorch_utils import Conv1D

    from launcher.config.activation import NoCheckpointing
    from launcher.config.attention import SdpaAttention
    from launcher.config.model.hf import Hf
    from launcher.models.adapters import MergedModel
    from launcher.models.build import build_model, skeleton
    from launcher.quantization.layers import matrices

    model, attention = Hf(name=str(source)), SdpaAttention()
    layers = matrices(skeleton(model, attention=attention)).items()
    built = build_model(model, seed=0, attention=attention, activation=NoCheckpointing())
    found = MergedModel(built.eval(), None, transposed={name for name, each in layers if isinstance(each, Conv1D)})
    print(f"the weights of {found.num_dequantized} {manifest.method.kind} layers are dequantized", flush=True)
    return found


def _export(source: Path, target: Path, options: ExportOptions, snapshot: Path | None) -> None:
    import torch

    from launcher.engines.distributed import DTYPES
    from launcher.models.export import ModelExport

    torch.set_num_threads(1)
    stored = _dequantized(source) if snapshot is None else _merged(source, snapshot)
    dtype = DTYPES[options.chosen_dtype] if options.format == SAFETENSORS else torch.float32
    export = ModelExport(source, dtype=dtype, max_shard_bytes=options.max_shard_bytes, stored=stored)
    if options.format == GGUF:
        _export_gguf(export, target, options)
        return
    if options.format != SAFETENSORS:
        _export_folder(export, target, options)
        return
    with byte_progress("writing", export.num_bytes) as written:
        export.write(target, written=written)
    files = counted(export.num_files, "file")
    print(f"{_size_text(export.num_params, options, export.num_bytes)} in {files}", flush=True)


def _size_text(num_params: int, options: ExportOptions, num_bytes: int) -> str:
    return f"{num_params:,} parameters, {options.chosen_dtype}, {bytes_text(num_bytes)}"


def _export_gguf(export: ModelExport, target: Path, options: ExportOptions) -> None:
    from launcher.models.export import write_file
    from launcher.models.gguf_export import GgufExport
    from launcher.verification.exported import check_export

    gguf = GgufExport(export, dtype=options.chosen_dtype)

    def fill(file: Path) -> None:
        with byte_progress("writing", gguf.num_bytes) as written:
            gguf.write(file, written=written)
        size = _size_text(gguf.num_params, options, file.stat().st_size)
        print(f"{size}; tensors: {gguf.kinds()}", flush=True)
        if options.check:
            print(check_export(file, export, options), flush=True)

    write_file(target, fill)


def _export_folder(export: ModelExport, target: Path, options: ExportOptions) -> None:
    from launcher.models.edge_folders import fill_onnx, fill_openvino
    from launcher.models.export import write_folder
    from launcher.verification.exported import check_export

    convert = fill_onnx if options.format == ONNX else fill_openvino

    def fill(folder: Path) -> None:
        with byte_progress("converting", export.num_bytes) as written:
            convert(export, folder, dtype=options.chosen_dtype, written=written)
        num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(_size_text(export.num_params, options, num_bytes), flush=True)
        if options.check:
            print(check_export(folder, export, options), flush=True)

    write_folder(target, fill)


if __name__ == "__main__":
    sys.exit(main())
