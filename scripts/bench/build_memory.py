"""Peak memory of each rank while it builds its part of a model, against one process that builds all of it.

Goal: at most (share of the model + largest part) x 1.2 above the level before building. Weights are random and fp32,
or with ``--stored`` read from bf16 weights on the disk, without the page cache. Each strategy runs in
processes of its own, after building a small model with the same code.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from harness import print_machine

from launcher.benchmarks.checkpoint import drop_page_cache
from launcher.utils.system import free_port

GOAL = 1.2
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Row:
    """A strategy to measure."""

    builder: str
    """Of ``build_memory_rank.py``."""
    overrides: tuple[str, ...]
    ranks: int


def rows(ranks: int) -> dict[str, Row]:
    """Return what can be measured, by name, on so many ranks."""
    stages = f"parallel.stages={ranks}"
    return {
        "naive": Row(builder="engine", overrides=("parallel=single",), ranks=1),
        "zero3": Row(builder="zero3", overrides=("parallel=zero3",), ranks=ranks),
        "fsdp": Row(builder="engine", overrides=("parallel=fsdp",), ranks=ranks),
        "pipeline": Row(builder="engine", overrides=("parallel=pipeline", stages), ranks=ranks),
    }


def sizes(model: str) -> tuple[int, int]:
    """Return the bytes of the whole model and of its largest part, in fp32, without building it."""
    from launcher.config.compose import compose
    from launcher.models.build import build_deferred
    from launcher.models.layers import units

    run = compose([f"model={model}"]).run
    laid_out, _ = build_deferred(run.model, seed=0, attention=run.attention)
    parts = [sum(parameter.numel() for parameter in part.parameters()) for _, part in units(laid_out)]
    return 4 * sum(parameter.numel() for parameter in laid_out.parameters()), 4 * max(parts)


def write_weights(model: str, folder: Path) -> None:
    """Write random bf16 weights as Transformers' folder of a model, one tensor in memory at a time."""
    import torch

    from launcher.checkpoint.file_writer import FileWriter
    from launcher.config.compose import compose
    from launcher.models.build import build_deferred
    from launcher.utils.safetensors_header import TensorEntry, header_bytes

    run = compose([f"model={model}"]).run
    laid_out, _ = build_deferred(run.model, seed=0, attention=run.attention)
    shapes = {name: tuple(parameter.shape) for name, parameter in laid_out.named_parameters()}
    folder.mkdir()
    laid_out.config.save_pretrained(folder)
    entries = [TensorEntry(name=name, dtype="BF16", shape=shape) for name, shape in shapes.items()]
    with FileWriter(folder / "model.safetensors") as file:
        file.write(np.frombuffer(header_bytes(entries, {"format": "pt"}), dtype=np.uint8))
        for shape in shapes.values():
            file.write(torch.randn(shape, dtype=torch.bfloat16).view(-1).view(torch.uint8).numpy())
        file.finish()


def measure(row: Row, model: str, folder: Path) -> list[dict[str, float]]:
    """Return what each rank found.

    Raises:
        RuntimeError: a rank failed; the message holds the end of what it printed.
    """
    out = folder / "found"
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={row.ranks}"]
    command = [*agent, str(HERE / "build_memory_rank.py"), row.builder, model, str(out), *row.overrides]
    env = {**os.environ, "BENCH_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {ended.returncode}:\n{(ended.stdout + ended.stderr)[-3000:]}"
        )
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(row.ranks)]


def line(name: str, row: Row, found: Sequence[dict[str, float]], *, whole: int, largest: int) -> str:
    """Return a row of the table: the worst rank, what it keeps, the bound, and whether it holds."""
    peak, kept = (max(each[key] for each in found) for key in ("peak_bytes", "kept_bytes"))
    bound = GOAL * (whole / row.ranks + largest)
    holds = "yes" if peak <= bound else "NO"
    each = " ".join(f"{rank['peak_bytes'] / 1e9:.2f}" for rank in found)
    seconds = max(rank["build_s"] for rank in found)
    peaks = f"{peak / 1e9:.2f} | {each} | {kept / 1e9:.2f} | {bound / 1e9:.2f}"
    return f"| {name} | {row.ranks} | {peaks} | {holds} | {seconds:.1f} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategies", nargs="*", help=f"of {', '.join(rows(4))}; all by default")
    parser.add_argument("--model", default="gpt2_xl", help="an option of the group model")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--stored", action="store_true", help="load bf16 weights from a folder on the disk")
    parser.add_argument("--folder", type=Path, help="where that is written; a temporary folder by default")
    arguments = parser.parse_args()

    known = rows(arguments.ranks)
    if unknown := [name for name in arguments.strategies if name not in known]:
        parser.error(f"no such strategy: {', '.join(unknown)}; there are {', '.join(known)}")
    print_machine("torch", "deepspeed", "transformers")
    whole, largest = sizes(arguments.model)
    print(f"{arguments.model}: {whole / 1e9:.2f} GB in fp32, its largest part {largest / 1e9:.2f} GB")
    print(f"bound: {GOAL} x (share + largest part) above the level before building; GB = 1e9 bytes\n")
    print("| strategy | ranks | peak of the worst rank (GB) | peak of each rank | kept | bound | within | s |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        stored = Path(folder) / "stored"
        if arguments.stored:
            write_weights(arguments.model, stored)
        for name in arguments.strategies or known:
            row = known[name]
            if arguments.stored:
                row = replace(row, overrides=(*row.overrides, f"model.weights={stored}"))
                drop_page_cache(stored)
            found = measure(row, arguments.model, Path(folder))
            print(line(name, row, found, whole=whole, largest=largest), flush=True)


if __name__ == "__main__":
    main()
