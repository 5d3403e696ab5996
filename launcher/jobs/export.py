"""The process of ``launch export``.

``python -m launcher.jobs.export SOURCE TARGET DTYPE MAX_SHARD_BYTES``
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from launcher.errors import LauncherError
from launcher.utils.logs import quiet_libraries
from launcher.utils.processes import die_with_parent
from launcher.utils.progress import byte_progress
from launcher.utils.system import disk_full_message
from launcher.utils.text import bytes_text, counted


def main() -> int:
    """Write the folder; print what it holds."""
    die_with_parent(os.getppid())
    quiet_libraries()
    source, target, dtype, max_shard_bytes = sys.argv[1:]
    folder = Path(target)
    try:
        _export(Path(source), folder, dtype=dtype, max_shard_bytes=int(max_shard_bytes))
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


def _export(source: Path, folder: Path, *, dtype: str, max_shard_bytes: int) -> None:
    import torch

    from launcher.engines.distributed import DTYPES
    from launcher.models.export import ModelExport

    torch.set_num_threads(1)
    export = ModelExport(source, dtype=DTYPES[dtype], max_shard_bytes=max_shard_bytes)
    with byte_progress("writing", export.num_bytes) as written:
        export.write(folder, written=written)
    files = counted(export.num_files, "file")
    print(f"{export.num_params:,} parameters, {dtype}, {bytes_text(export.num_bytes)} in {files}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
