"""``profiled_engine.py RUN_DIR``: start a server's engine, have it answer one request, end it; print what it printed.

A fork of a process that has imported torch forks the engine too.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.loop import AddRequest, EngineConnection, Shutdown, StepOutputs

ours, engine_end = socket.socketpair()
words = (sys.argv[1], "7", str(engine_end.fileno()), str(os.getpid()))
command = [sys.executable, "-m", "launcher.inference.server.replica", *words]
with subprocess.Popen(command, pass_fds=[engine_end.fileno()], stdout=subprocess.PIPE, text=True) as engine, ours:
    engine_end.close()
    link, is_finished = EngineConnection(ours), False
    sampling = SamplingParams(max_tokens=9, ignore_eos=True)
    link.send(AddRequest(request=EngineRequest(id="one", prompt=(1, 2, 3), sampling=sampling)))
    while not is_finished:
        steps = [each for each in link.receive(wait_s=1) if isinstance(each, StepOutputs)]
        is_finished = any(output.finish_reason for step in steps for output in step.outputs)
    link.send(Shutdown())
    print(engine.communicate(timeout=60)[0])
sys.exit(engine.returncode)
