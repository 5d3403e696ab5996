"""``python -m launcher.ops.compile NAME``: compile and load one operator, in a process of its own."""

from __future__ import annotations

import shlex
import sys

BUILDERS = {
    "async_io": "AsyncIOBuilder",
    "cpu_adam": "CPUAdamBuilder",
    "fused_adam": "FusedAdamBuilder",
    "pin_memory": "PinMemoryBuilder",
}
"""DeepSpeed's builder of each operator this program can need."""


def quote_library_path() -> None:
    """Let torch link operators where its own folder's path holds a space: it writes ``-L`` without quotes.

    The process that builds and the ranks that load call this, or ninja sees another command and links again.
    """
    from torch.utils import cpp_extension

    if not cpp_extension.TORCH_LIB_PATH.startswith("'"):
        cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)


def main(name: str) -> None:
    """Build ``name`` unless it is up to date, and load it."""
    from deepspeed.accelerator import get_accelerator

    quote_library_path()
    get_accelerator().create_op_builder(BUILDERS[name]).load(verbose=False)


if __name__ == "__main__":
    main(sys.argv[1])
