"""``python -m launcher.inference.engine.vllm_exec PARENT PROGRAM …``: dies with its parent."""

from __future__ import annotations

import os
import sys

from launcher.utils.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))  # the promise outlives exec
    os.environ.pop("PYTHONPATH", None)  # the program has an environment of its own
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606  (no shell is needed)
