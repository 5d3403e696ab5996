"""Time and peak memory of each rank while it loads a checkpoint that one process wrote, under several strategies.

    python scripts/bench/checkpoint_memory.py [--model gpt2] [--folder DIR] [ROW ...] [--options optimizer=sgd ...]

With AdamW the checkpoint holds fp32 weights and both moments: 12 bytes a parameter, and under ZeRO-3 the two ranks need
about 20 bytes a parameter of memory. Goal: above what a rank keeps, no more than its largest tensor. Files are read
from the disk: the page cache is dropped before each row. For weights alone, in bf16: build_memory.py --stored.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from harness import BIN, print_machine

from launcher.benchmarks.checkpoint import drop_page_cache

HERE = Path(__file__).resolve().parent
SLACK_BYTES = 128 << 20
"""Of the file, which is mapped (64 MiB at a time), of code that loading imports, and of the allocator."""
RANKS = {
    "single": 1,
    "ddp": 2,
    "fsdp": 2,
    "zero0": 2,
    "zero1": 2,
    "zero2": 2,
    "zero2_offload": 2,
    "zero3": 2,
    "zero3_offload": 2,
    "pipeline": 2,
}
"""Rows: strategies that load the checkpoint, each with its number of ranks."""
STRATEGIES = {"zero2_offload": ("parallel=zero2", "parallel.offload_optimizer=cpu")}
"""Overrides of the rows that are no option of the group parallel."""


def run_ranks(what: str, name: str, *, model: str, folder: Path, options: Sequence[str] = ()) -> list[dict[str, float]]:
    """Save or load on the ranks of a row; return what each found.

    Raises:
        RuntimeError: a rank failed; the message holds the end of what it printed.
    """
    out, ranks = folder / "found", RANKS[name]
    agent = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={ranks}"]
    words = [what, model, str(folder), str(out), *STRATEGIES.get(name, (f"parallel={name}",)), *options]
    command = [*agent, str(HERE / "checkpoint_memory_rank.py"), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if ended.returncode:
        printed = (ended.stdout + ended.stderr)[-9000:]
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{printed}")
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]


def line(name: str, found: Sequence[dict[str, float]], *, num_bytes: int, largest: int) -> str:
    """Return a row of the table: the slowest rank's time, and the highest peak."""
    seconds = max(each["load_s"] for each in found)
    over = max(each["peak_bytes"] - each["kept_bytes"] for each in found)
    peak, kept = (max(each[key] for each in found) for key in ("peak_bytes", "kept_bytes"))
    holds = "yes" if over <= largest + SLACK_BYTES else "NO"
    numbers = (
        f"{seconds:.2f} | {num_bytes / seconds / 1e6:,.0f} | {peak / 1e9:.2f} | {kept / 1e9:.2f} | {over / 1e9:.2f}"
    )
    return f"| {name} | {RANKS[name]} | {numbers} | {holds} |"


def main() -> None:
    """Write, load under each strategy, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(RANKS)}; all by default")
    parser.add_argument("--model", default="gpt2", help="an option of the group model")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written; a temporary one by default")
    parser.add_argument("--options", nargs="+", default=[], metavar="OPTION", help="of each run: optimizer=sgd")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.rows if name not in RANKS]:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(RANKS)}")
    print_machine("torch", "deepspeed", "transformers")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        run = partial(run_ranks, model=arguments.model, folder=folder, options=arguments.options)
        (written,) = run("save", "single")
        num_bytes = sum(file.stat().st_size for file in (folder / "saved").rglob("*") if file.is_file())
        largest = int(written["largest_bytes"])
        print(f"{arguments.model}: {num_bytes / 1e9:.2f} GB, written in {written['save_s']:.2f} s by one process")
        print(f"bound: largest tensor ({largest / 1e9:.2f} GB) + {SLACK_BYTES / 1e9:.2f} GB above what is kept\n")
        print("| loaded as | ranks | s | MB/s | peak above start (GB) | kept | above kept | within |")
        print("|---|---|---|---|---|---|---|---|")
        for row in arguments.rows or RANKS:
            drop_page_cache(folder / "saved")
            found = run("load", row)
            print(line(row, found, num_bytes=num_bytes, largest=largest), flush=True)


if __name__ == "__main__":
    main()
