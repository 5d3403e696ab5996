"""Runs whose ranks import no torch: they repeat prompts (``job.engine=echo``), and start in a tenth of the time.

For tests of what lies around ranks: hosts, signals, ends. What ranks compute, other tests see.
"""

from __future__ import annotations

from pathlib import Path

from tests.helpers import wait_for

NUM_PROMPTS = 20_000
"""For two ranks, an hour at the pace of ``endless``."""

ECHO = ("job=generate", "job.engine=echo", "job.tokenizer=bytes", "tracker=local", "backend.threads=1")


def endless(folder: Path) -> tuple[str, ...]:
    """Return the overrides of a run that no test sees end; its prompts are written into ``folder``."""
    prompts = folder / "prompts.txt"
    prompts.write_text("x\n" * NUM_PROMPTS)
    return (*ECHO, f"job.input={prompts}", "job.max_tokens=1", "job.max_num_seqs=2", "job.echo_step_s=0.2")


def brief(folder: Path) -> tuple[str, ...]:
    """Return the overrides of a run that ends by itself; its prompts are written into ``folder``."""
    prompts = folder / "few.txt"
    prompts.write_text("x\n" * 4)
    return (*ECHO, f"job.input={prompts}", "job.max_tokens=1")


def wait_for_answers(run_dir: Path, *, ranks: int = 2, seconds: float = 120) -> None:
    """Wait until every rank has written an answer."""
    parts = [run_dir / "generated" / f"rank{rank}.part" for rank in range(ranks)]
    wait_for(lambda: all(part.exists() and b"\n" in part.read_bytes() for part in parts), seconds=seconds)
