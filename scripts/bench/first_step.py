"""Seconds from the command to the end of the first optimizer step, against torchrun on a bare script on the same work.

Goal: at most 1.15 x the bare script's plus 1 s.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

from bare import bare_step_times, launcher_step_times
from harness import alternate, print_machine
from workload import Workload

FACTOR, SECONDS = 1.15, 1.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    work = replace(Workload(), steps=1)
    print_machine("torch", "transformers")
    with tempfile.TemporaryDirectory() as root:
        folders = (Path(root) / str(number) for number in itertools.count())

        def launcher() -> float:
            return launcher_step_times(work, "parallel=ddp", folder=next(folders))[0]

        def bare_torchrun() -> float:
            return bare_step_times(work, "bare_ddp.py", folder=next(folders))[0]

        launcher()  # once each, so that every file is in memory
        bare_torchrun()
        medians = alternate({"launcher": launcher, "bare torchrun": bare_torchrun}, rounds=rounds, unit="s")
    bare = medians["bare torchrun"]
    bound = f"{FACTOR} x {bare:.2f} + {SECONDS:g} = {FACTOR * bare + SECONDS:.2f} s"
    print(f"launcher {medians['launcher']:.2f} s; goal: at most {bound}")


if __name__ == "__main__":
    main()
