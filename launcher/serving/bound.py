"""``python -m launcher.serving.bound PARENT PROGRAM …``: becomes a program that dies with its parent."""

from __future__ import annotations

import os
import sys

from launcher.supervise.linux import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))  # the promise outlives exec
    os.environ.pop("PYTHONPATH", None)  # the program has an environment of its own
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606  (a shell is what nobody wants here)
