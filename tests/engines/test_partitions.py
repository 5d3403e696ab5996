"""Partitions of a buffer on ranks of their own: what a rank lacks comes from the others, without a second copy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SHARE = """
import os
import sys
import torch
from torch import distributed as dist
from launcher.benchmarks.instruments import PeakMemory
from launcher.engines.distributed import share_partitions
rank, numel = int(os.fork() == 0), 8 << 20
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
weights = torch.full((2 * numel,), -1.0)
partitions = weights.split(numel)
partitions[rank].fill_(rank + 1.0)
dist.barrier()
peak = PeakMemory(torch.device("cpu"))
share_partitions(partitions, dist.group.WORLD)
above = peak.above_before() >> 20
print(f"{above} {weights[:numel].unique().tolist()} {weights[numel:].unique().tolist()}\\n", end="", flush=True)
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    os.wait()
"""


def test_sharing_partitions_takes_no_second_copy(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARE, str(tmp_path / "store")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=300)
    printed = [line.split(maxsplit=1) for line in ended.stdout.splitlines()]
    assert [values for _, values in printed] == ["[1.0] [2.0]"] * 2
    assert max(int(mebibytes) for mebibytes, _ in printed) < 24, "all partitions together have 64"
