"""A rank of the fault matrix: sums over all ranks twenty times a second and counts; ``faults_rank.py FOLDER VARIANT``.

The same program under every launcher. Under ours it enters as every rank of a real run does.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

LIFE_S = 3600.0


def work(folder: Path, variant: str, heartbeat: Callable[[int], None]) -> None:
    """Be a rank for an hour; ``steps.<rank>`` holds the number of steps done."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if variant == "ignores TERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        env = {name: value for name, value in os.environ.items() if name != "RANK"}  # or it would look like a rank
        command = ["setsid", "--fork", "sleep", str(LIFE_S)]
        # with our stdout it would also hold ssh open, and so hang launchers that wait for no more than that
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    import torch.distributed

    torch.distributed.init_process_group("gloo")
    counter = os.open(folder / f"steps.{torch.distributed.get_rank()}", os.O_WRONLY | os.O_CREAT)
    end, step = time.monotonic() + LIFE_S, 0
    while time.monotonic() < end:
        torch.distributed.all_reduce(torch.ones(1))
        step += 1
        os.pwrite(counter, f"{step:012}".encode(), 0)
        heartbeat(step)
        time.sleep(0.05)


def main() -> None:
    """Become the rank that the environment names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("variant")
    parser.add_argument("--local_rank", help="deepspeed passes it")
    arguments = parser.parse_args()
    if "LAUNCHER_AGENT_SCRATCH" not in os.environ:
        work(arguments.folder, arguments.variant, lambda step: None)
        return

    from launcher.protocol.rank_env import read_rank_env
    from launcher.supervision.rank_monitor import run_rank

    run_rank(
        lambda env, heartbeat: work(
            env.run_dir.path, arguments.variant, lambda step: heartbeat.update("forward", step, steps=10**6)
        ),
        read_rank_env(arguments.folder, os.environ),
    )


if __name__ == "__main__":
    main()
