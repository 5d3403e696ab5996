"""Tokens a second against a bare torch DDP loop and a bare DeepSpeed script on the same work.

Goal: at least 0.97 of each. Runs are whole and in turn, A B A B; the first steps of each are left out.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bare import bare_step_times, launcher_step_times, tokens_per_s
from harness import alternate, print_machine
from workload import Workload

GOAL = 0.97
SKIP = 4


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The launcher's way and the bare way of doing the same work."""

    name: str
    overrides: tuple[str, ...]
    script: str
    zero_stage: int = 0

    def compare(self, work: Workload, *, rounds: int, folders: Iterator[Path]) -> None:
        """Measure both in turn and print the ratio."""

        def ours() -> float:
            return tokens_per_s(work, launcher_step_times(work, *self.overrides, folder=next(folders)), skip=SKIP)

        def bare() -> float:
            times = bare_step_times(work, self.script, folder=next(folders), zero_stage=self.zero_stage)
            return tokens_per_s(work, times, skip=SKIP)

        medians = alternate({f"launcher {self.name}": ours, self.script: bare}, rounds=rounds, unit="tokens/s")
        ratio = medians[f"launcher {self.name}"] / medians[self.script]
        print(f"{self.name}: launcher / bare = {ratio:.3f} (goal: at least {GOAL})\n", flush=True)


def zero(stage: int) -> Pair:
    """Return the pair for one stage of ZeRO; both sides take torch's AdamW, so that the same code updates weights."""
    return Pair(
        name=f"zero{stage}",
        overrides=(f"parallel=zero{stage}", "optimizer.implementation=torch"),
        script="bare_deepspeed.py",
        zero_stage=stage,
    )


DDP = Pair(name="ddp", overrides=("parallel=ddp",), script="bare_ddp.py")
PAIRS = {pair.name: pair for pair in (DDP, zero(1), zero(2), zero(3))}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", default=[*PAIRS], help=f"of {', '.join(PAIRS)}; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    work = replace(Workload(), steps=arguments.steps)
    print_machine("torch", "deepspeed", "transformers")
    print(f"{work}\n{work.tokens_per_step} tokens a step; the first {SKIP} steps are left out\n")
    with tempfile.TemporaryDirectory() as root:
        folders = (Path(root) / str(number) for number in itertools.count())
        for name in arguments.pairs:
            PAIRS[name].compare(work, rounds=arguments.rounds, folders=folders)


if __name__ == "__main__":
    main()
