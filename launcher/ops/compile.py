"""``python -m launcher.ops.compile NAME``: compile and load one operator in its own process."""

from __future__ import annotations

import sys

from launcher.utils.build_cache import quote_torch_library_path

BUILDERS = {
    "async_io": "AsyncIOBuilder",
    "cpu_adam": "CPUAdamBuilder",
    "fused_adam": "FusedAdamBuilder",
    "pin_memory": "PinMemoryBuilder",
}
"""DeepSpeed's builder of each operator this program can need."""


def main(name: str) -> None:
    """Build ``name`` unless it is up to date, and load it."""
    from launcher.utils.deepspeed_library import deepspeed  # seconds

    quote_torch_library_path()
    deepspeed.accelerator.get_accelerator().create_op_builder(BUILDERS[name]).load(verbose=False)


if __name__ == "__main__":
    main(sys.argv[1])
