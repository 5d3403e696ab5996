"""Check and measure what is claimed of a GPU, in one command; exit code 2 where there is none, 1 where a check fails.

Measures tokens/s and MFU of training on one GPU by strategy (compile, activation policy, attention kernel), beside a
bare torch loop and Hugging Face's Trainer on the same work in the same run, A B A B, and prints a table with its date.
Checks that losses in tf32 and fp8 are those of fp32, and that NCCL works with a world of one.

Its parts are tested on a CPU (--device cpu --model tiny).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from gpu_claims import CHECKS
from gpu_rows import Row, measure, rows, table
from harness import describe_machine
from workload import Workload

from launcher.utils.hardware import list_gpus

MODELS = {
    "gpt2_xl": Workload(
        ranks=1,
        layers=48,
        heads=25,
        width=1600,
        vocab_size=50257,
        sequence_length=1024,
        threads=8,
        micro_batch=4,
        accumulation=1,
        precision="bf16",
    ),
    "tiny": Workload(
        ranks=1,
        layers=2,
        heads=2,
        width=64,
        vocab_size=512,
        sequence_length=32,
        micro_batch=2,
        accumulation=1,
        precision="bf16",
    ),
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="gpt2_xl", help="tiny is for tests of this script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for tests of this script")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run")
    parser.add_argument("--skip", type=int, default=6, help="first steps, which are left out: compiling, warming up")
    parser.add_argument("--rounds", type=int, default=2, help="times each is run, all in turn")
    parser.add_argument("--minutes", type=float, default=60, help="no run is started later; what is there is printed")
    parser.add_argument("--micro-batch", type=int, help="sequences in a step")
    parser.add_argument("--only", nargs="*", metavar="ROW", help=f"rows to measure: {', '.join(rows())}; default all")
    parser.add_argument("--no-checks", action="store_true", help="measure alone")
    parser.add_argument("--out", type=Path, help="file that gets what is printed, as Markdown")
    options = parser.parse_args(words)
    if unknown := set(options.only or ()) - set(rows()):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if not 0 < options.skip < options.steps:
        parser.error(f"--skip {options.skip} must lie between 0 and --steps {options.steps}")
    return options


def main() -> int:
    """Measure, check, print."""
    options = parse()
    gpus = list_gpus()
    if options.device == "cuda" and not gpus:
        print("gpu_check: there is no NVIDIA GPU on this machine", file=sys.stderr)
        return 2
    work = replace(MODELS[options.model], steps=options.steps)
    if options.micro_batch:
        work = replace(work, micro_batch=options.micro_batch)
    chosen: dict[str, Row] = {name: row for name, row in rows().items() if options.only is None or name in options.only}
    name = gpus[0].name if options.device == "cuda" else None
    parts = [f"{describe_machine('torch', 'transformers')}\ndevice: {name or 'CPU (a test of this script)'}\n{work}"]
    print(parts[0], flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        if chosen:
            until = time.monotonic() + 60 * options.minutes
            found = measure(chosen, work, rounds=options.rounds, skip=options.skip, folder=Path(folder), until=until)
            parts.append("\n".join(table(found, work, device_name=name)))
            print(f"\n{parts[-1]}", flush=True)
        for title, check in {} if options.no_checks else CHECKS.items():
            verdict = check(options.device, Path(folder))
            failed += verdict.startswith("FAILED")
            parts.append(f"{title}: {verdict}")
            print(parts[-1], flush=True)
    if options.out:
        options.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
