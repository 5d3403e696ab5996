"""``serving_rank.py RUN_DIR``: do the job of a run directory as its only rank does, without torchrun around it."""

import sys
from pathlib import Path

from launcher.config.snapshot import load_run
from launcher.engines.context import Context
from launcher.jobs.registry import execute_job
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.rundir import RunDir

run_dir = RunDir(Path(sys.argv[1]))
run = load_run(run_dir.snapshot)
execute_job(Context(run=run, run_dir=run_dir, rank=0, local_rank=0, world_size=1, heartbeat=Heartbeat(None)))
