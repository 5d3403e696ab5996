"""The process of ``launch export``: ``python -m launcher.jobs.export SOURCE TARGET DTYPE MAX_SHARD_BYTES``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from launcher.engines.distributed import DTYPES
from launcher.errors import LauncherError
from launcher.models.export import ModelExport
from launcher.utils.progress import byte_progress
from launcher.utils.system import disk_full_message
from launcher.utils.text import bytes_text, counted


def main() -> int:
    """Write the folder; print what it holds."""
    source, target, dtype, max_shard_bytes = sys.argv[1:]
    torch.set_num_threads(1)
    folder = Path(target)
    try:
        export = ModelExport(Path(source), dtype=DTYPES[dtype], max_shard_bytes=int(max_shard_bytes))
        with byte_progress("writing", export.num_bytes) as written:
            export.write(folder, written=written)
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {disk_full_message(error, {'DIR': folder.parent}) or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {folder} was not written", file=sys.stderr)
        return 130
    files = counted(export.num_files, "file")
    print(f"{export.num_params:,} parameters, {dtype}, {bytes_text(export.num_bytes)} in {files}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
