"""How long the plan of many hosts takes to print, and how it grows, for every backend: whole processes.

Goal: 1,024 hosts of 8 ranks in under 2 s, and a size that grows in proportion to the hosts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import print_machine

GOAL_S = 2.0
COUNTS = (64, 256, 1024)
SLOTS = 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print_machine("hydra-core")
    print("| backend | hosts | text | JSON | bytes of text | bytes of JSON | bytes of JSON a host |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("ssh", "deepspeed", "slurm", "kubernetes"):
            for count in COUNTS:
                words = words_of(backend, count, Path(folder))
                text_s, text = measure(words, rounds=rounds)
                json_s, tree = measure([*words, "--json"], rounds=rounds)
                each = f"{tree / count:,.0f}"
                print(
                    f"| {backend} | {count:,} | {text_s:.2f} s | {json_s:.2f} s | {text:,} | {tree:,} | {each} |",
                    flush=True,
                )


def words_of(backend: str, count: int, folder: Path) -> list[str]:
    """Return the command line that plans ``count`` hosts."""
    words = ["+exp=zero2_gpt2_large", "job.global_batch=null", f"backend={backend}"]
    if backend in ("slurm", "kubernetes"):
        return [*words, f"backend.nodes={count}", f"backend.ranks={SLOTS}", *_IMAGE.get(backend, ())]
    hostfile = folder / f"hosts{count}"
    hostfile.write_text("".join(f"node{number:04} slots={SLOTS}\n" for number in range(count)))
    return [*words, f"backend.hostfile={hostfile}"]


_IMAGE = {"kubernetes": ("backend.image=registry.example/launcher:1",)}


def measure(words: list[str], *, rounds: int) -> tuple[float, int]:
    """Return the fastest of several processes, in seconds, and how much it printed, in bytes."""
    times, size = [], 0
    for _ in range(rounds):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "launcher", "plan", *words], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
        size = len(done.stdout)
    return min(times), size


if __name__ == "__main__":
    main()
