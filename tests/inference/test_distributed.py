"""A model in slices or stages on several ranks generates what the whole one does."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from launcher.utils.system import free_port

WORKER = Path(__file__).with_name("spread_worker.py")


@cache
def served(world_size: int, *words: str) -> str:
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(world_size):
        env = {**os.environ, **common, "RANK": str(rank), "WORLD_SIZE": str(world_size)}
        command = [sys.executable, str(WORKER), *words]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, outputs
    return next(line for line in outputs[0].splitlines() if line.startswith("found"))


@pytest.mark.parametrize(
    ("model", "ranks", "parallel"),
    [
        ("llama_tiny", 2, ("parallel=tensor", "parallel.tensor=2")),
        ("llama_tiny", 2, ("parallel=pipeline",)),
        ("gpt2_tiny", 3, ("parallel=pipeline", "parallel.stages=3")),
    ],
    ids=["slices", "stages", "gpt2"],
)
def test_ranks_with_parts_of_a_model_generate_what_one_with_all_does(
    model: str, ranks: int, parallel: tuple[str, ...]
) -> None:
    assert served(ranks, f"model={model}", *parallel) == served(1, f"model={model}", "parallel=single")
