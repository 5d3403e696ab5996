"""How long a plan takes to print, against ``torchrun --help``: whole processes, in turn. Goal: at most 0.3."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from harness import BIN, alternate, print_machine, run_to_end

GOAL = 0.3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds

    plan = [sys.executable, "-m", "launcher", "+exp=zero3_gpt2xl", "dry_run=true"]
    bare = [str(BIN / "torchrun"), "--help"]
    print_machine("torch", "hydra-core")
    run_to_end(plan)  # both once for the file cache
    run_to_end(bare)
    variants = {"plan": partial(run_to_end, plan), "torchrun --help": partial(run_to_end, bare)}
    medians = alternate(variants, rounds=rounds, unit="s")
    print(f"plan / torchrun --help = {medians['plan'] / medians['torchrun --help']:.3f} (goal: at most {GOAL})")


if __name__ == "__main__":
    main()
