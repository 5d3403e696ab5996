"""A model sliced over ranks generates what the whole one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from launcher.ports import free_port

WORKER = Path(__file__).with_name("tensor_worker.py")


def served(world_size: int) -> str:
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(world_size):
        env = {**os.environ, **common, "RANK": str(rank), "WORLD_SIZE": str(world_size)}
        command = [sys.executable, str(WORKER)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, outputs
    return next(line for line in outputs[0].splitlines() if line.startswith("found"))


def test_two_ranks_with_half_of_each_matrix_generate_what_one_does() -> None:
    assert served(2) == served(1)
