"""The session as a process of its own: ``parent.py PLAN.json``."""

import json
import subprocess
import sys
from pathlib import Path

from launcher.backends.local import LocalExecutor
from launcher.config.backend.local import LocalBackend
from launcher.protocol.plan import plan_from_json
from launcher.protocol.rundir import RunDir
from launcher.supervision.finalize import finalize_run

plan = plan_from_json(json.loads(Path(sys.argv[1]).read_text()))
run_dir = RunDir(Path(plan.run_dir))
stranger = subprocess.Popen(["cat"], stdin=subprocess.PIPE, env={})  # has nothing to do with the run
outcome = LocalExecutor(LocalBackend()).submit(plan)
if outcome.port_taken:
    print("port taken", flush=True)
else:
    finalize_run(outcome, run_dir, run_id=plan.run_id)
if stranger.poll() is not None:
    sys.exit("the session ended a process that was not its own")
stranger.communicate()
sys.exit(outcome.exit_code)
