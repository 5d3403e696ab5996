"""Collectives between real ranks: figures for every size, and no wrong value goes unseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from launcher.errors import ConfigErrors
from tests.ports import free_port

WORDS = ("job=benchmark", "benchmark=collectives", "tracker=local")
NAMES = ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all"]


def test_the_command_measures_every_collective_at_every_size_on_all_ranks(launch) -> None:
    sizes = ("benchmark.smallest_bytes=1000", "benchmark.largest_bytes=100_000", "benchmark.factor=10")
    ended = launch(*WORDS, *sizes, "benchmark.duration_s=0.01", "benchmark.repeats=2", "backend.ranks=3").expect(0)
    found = json.loads((ended.run_dir / "benchmark.json").read_text())
    assert list(found["cases"]) == [f"{name}/{size}" for size in (1000, 10_000, 100_000) for name in NAMES]
    assert found["facts"]["all_gather/1000"]["bytes"] == 996  # 83 values of each of the 3 ranks
    case = found["cases"]["all_reduce/100000"]
    for call_us, algorithm, bus in zip(*case.values(), strict=True):
        assert algorithm == pytest.approx(99_996 / call_us / 1000)
        assert bus == pytest.approx(algorithm * 4 / 3)
    metrics = json.loads((ended.run_dir / "result.json").read_text())["metrics"]
    assert metrics["benchmark/broadcast/bus_bandwidth_gb_per_s"] > 0
    assert metrics["train/step"] == 30
    table = (ended.run_dir / "benchmark.md").read_text()
    assert "every result was checked on every rank 30 times, and was right" in table
    assert "| message, bytes | 1,000 | 10,000 | 100,000 |" in table
    assert "3 ranks on 1 host, gloo, bus bandwidth (GB/s):" in table
    assert "Warning" not in ended.output


PLANTED = """
import sys
from types import SimpleNamespace
from torch import distributed as dist
from launcher.benchmarks.collectives import measure_collectives
from launcher.config.benchmark.distributed import CollectivesBenchmark
from launcher.protocol.rundir import RunDir
from launcher.protocol.heartbeat import Heartbeat
from pathlib import Path

def lossy(tensor, *rest, **options):
    true(tensor, *rest, **options)
    if tensor.numel() == 64 and dist.get_rank() == 1:
        tensor[17] += 1

rank, folder = int(sys.argv[1]), sys.argv[2]
true, dist.broadcast = dist.broadcast, lossy
run = SimpleNamespace(backend=SimpleNamespace(stall_timeout_s=60.0))
context = SimpleNamespace(run=run, run_dir=RunDir(Path(folder)), rank=rank, local_rank=rank, world_size=2,
                          heartbeat=Heartbeat(None), is_main=rank == 0)
benchmark = CollectivesBenchmark(smallest_bytes=64, largest_bytes=256, duration_s=0.001, repeats=1)
try:
    measure_collectives(benchmark, context)
except Exception as error:
    print("ENDED", type(error).__name__, error)
"""


def test_a_wrong_value_on_one_rank_ends_the_job_on_all(tmp_path) -> None:
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PLANTED, str(rank), str(tmp_path)],
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=100)[0] for rank in ranks]
    ending = "ENDED JobError broadcast of 256 bytes gives wrong values on rank 1"
    assert all(ending in text for text in printed), printed
    assert "broadcast, 256 bytes: 1 values are wrong on this rank" in printed[1]


def test_bandwidths_are_those_of_nccl_tests() -> None:
    from launcher.benchmarks.collectives import bus_bandwidth_factor

    assert [bus_bandwidth_factor(name, 4) for name in NAMES] == [1.5, 0.75, 0.75, 1.0, 0.75]


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        ((), 1, r"backend\.ranks=1: a collective needs at least 2 ranks; set backend\.ranks=2$"),
        (("parallel=single",), 1, r"set backend\.ranks=2 parallel=ddp"),
        (("benchmark.smallest_bytes=4",), 2, r"benchmark\.smallest_bytes=4.*: 2 ranks x 4 bytes = 8"),
        (
            ("benchmark.largest_bytes=512",),
            2,
            r"benchmark\.largest_bytes=512.*: is below benchmark\.smallest_bytes=1024",
        ),
        (("benchmark.factor=1",), 2, r"benchmark\.factor=1.*: must be at least 2"),
        (("benchmark.duration_s=0",), 2, r"benchmark\.duration_s=0.*: must be above 0"),
        (("benchmark.collectives=[]",), 2, r"benchmark\.collectives.*: is empty or has duplicates"),
        (("benchmark.collectives=[all_reduse]",), 2, "did you mean all_reduce"),
    ],
)
def test_nonsense_is_refused(plan_of, words, ranks, message) -> None:
    from launcher.protocol.plan import Host

    with pytest.raises(ConfigErrors, match=message):
        plan_of(*WORDS, *words, hosts=[Host(name="box", slots=ranks, cores=4)])


def test_the_plan_shows_sizes_and_counts_measurements(plan_of) -> None:
    from launcher.protocol.plan import Host

    plan = plan_of(*WORDS, "benchmark.largest_bytes=20_000", hosts=[Host(name="box", slots=2, cores=4)])
    assert plan.details["messages"] == "1.00 KiB, 4.00 KiB, 16.00 KiB"
    assert plan.work.num_steps == 3 * 3 * 5
