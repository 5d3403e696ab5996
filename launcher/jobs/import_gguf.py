"""The process that converts a GGUF file to a model folder.

``python -m launcher.jobs.import_gguf FILE FOLDER``, whose ``FOLDER`` exists and is empty.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launcher.errors import LauncherError
from launcher.utils.logs import quiet_libraries
from launcher.utils.processes import die_with_parent
from launcher.utils.system import disk_full_message


def main() -> int:
    """Write the folder; print the error on standard error."""
    die_with_parent(os.getppid())
    quiet_libraries()
    file, folder = map(Path, sys.argv[1:3])
    from launcher.models.gguf import convert_gguf

    try:
        convert_gguf(file, folder)
    except LauncherError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(disk_full_message(error, {"XDG_CACHE_HOME": folder.parent}) or error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
