"""Take one case of a benchmark in a process of its own, with a profile; print the number of its samples.

    python profiled_case.py RUN_DIR FUNCTION NAME ARGUMENTS OVERRIDES...

ARGUMENTS is a JSON object. A fork of a process that has imported torch forks the case too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launcher.benchmarks.harness import sample_interleaved
from launcher.config.compose import compose
from launcher.engines.context import Context
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.rundir import RunDir

folder, function, name, arguments, *words = sys.argv[1:]
run, heartbeat = compose(words).run, Heartbeat(None)
context = Context(run=run, run_dir=RunDir(Path(folder)), rank=0, local_rank=0, world_size=1, heartbeat=heartbeat)
answers = sample_interleaved(function, {name: json.loads(arguments)}, repeats=1, context=context)
print(len(answers[name]))
