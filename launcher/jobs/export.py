"""The process of ``launch export``.

``python -m launcher.jobs.export SOURCE TARGET DTYPE MAX_SHARD_BYTES [RUN_YAML]``

With ``RUN_YAML``, the snapshot of the run that trained an adapter, the adapter is merged into that run's model.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.adapter_folder import is_adapter_folder
from launcher.errors import LauncherError
from launcher.utils.logs import quiet_libraries
from launcher.utils.processes import die_with_parent
from launcher.utils.progress import ProgressLines, byte_progress
from launcher.utils.system import disk_full_message
from launcher.utils.text import bytes_text, counted

if TYPE_CHECKING:
    from launcher.models.weights import ModelTensors


def main() -> int:
    """Write the folder; print what it holds."""
    die_with_parent(os.getppid())
    quiet_libraries()
    source, target, dtype, max_shard_bytes, *snapshot = sys.argv[1:]
    folder = Path(target)
    try:
        if is_adapter_folder(Path(source)) and not snapshot:
            _export_adapter(Path(source), folder, dtype=dtype)
        else:
            merge = Path(snapshot[0]) if snapshot else None
            _export(Path(source), folder, dtype=dtype, max_shard_bytes=int(max_shard_bytes), merge=merge)
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {disk_full_message(error, {'DIR': folder.parent}) or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {folder} was not written", file=sys.stderr)
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


def _export(source: Path, folder: Path, *, dtype: str, max_shard_bytes: int, merge: Path | None) -> None:
    import torch

    from launcher.engines.distributed import DTYPES
    from launcher.models.export import ModelExport

    torch.set_num_threads(1)
    stored = None if merge is None else _merged(source, merge)
    export = ModelExport(source, dtype=DTYPES[dtype], max_shard_bytes=max_shard_bytes, stored=stored)
    with byte_progress("writing", export.num_bytes) as written:
        export.write(folder, written=written)
    files = counted(export.num_files, "file")
    print(f"{export.num_params:,} parameters, {dtype}, {bytes_text(export.num_bytes)} in {files}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
