"""vLLM's own server as a process below this one, in an environment of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from launcher.ports import free_port
from launcher.serving.api.keys import VARIABLE
from launcher.supervise.processes import Process, identify

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.jobs.generating import GeneratingJob

_SERVER = "vllm.entrypoints.openai.api_server"
_ENDING_S = 3.0


class VllmServer:
    """One server on a loopback port.

    Args:
        run: whose model is served.
        job: how.
        name: what requests call the model.

    Attributes:
        port: where it listens.
    """

    def __init__(self, run: Run, job: GeneratingJob, *, name: str) -> None:
        self._run, self._job, self._name = run, job, name
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: Process | None = None
        self._started_s = 0.0

    def command(self, model: str) -> list[str]:
        """Return what is started, for a folder of weights."""
        job, run = self._job, self._run
        python = str(Path(job.vllm_python or "").expanduser())
        # the module: the command `vllm` looks for a package of that name, which builds for CPUs do not have
        words = [python, "-m", _SERVER, "--model", model, "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--served-model-name", self._name, "--max-num-seqs", str(job.max_requests)]
        words += ["--dtype", {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[run.precision.compute]]
        words += ["--seed", str(job.seed)]
        if not job.prefix_cache:
            words += ["--no-enable-prefix-caching"]
        return words

    def start(self, model: str) -> None:
        """Start it, or start it anew after it has ended; it dies with this process.

        Args:
            model: folder of weights.
        """
        environ = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "PYTHONPATH")}
        # its build for CPUs, which alone reads this, would take nine tenths of all memory for keys and values
        environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, psutil.virtual_memory().available // 2**32)))
        bound = [sys.executable, "-m", "launcher.serving.bound", str(os.getpid())]
        # the wrapper is ours and needs our path; what it becomes has an environment of its own
        ours = {**environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        self._process = subprocess.Popen([*bound, *self.command(model)], env=ours, stdin=subprocess.DEVNULL)
        self._known, self._started_s = identify(self._process.pid), time.monotonic()

    @property
    def is_started(self) -> bool:
        """Whether ``start`` has been called."""
        return self._process is not None

    def exit_code(self) -> int | None:
        """Return how it ended, ``None`` while it runs."""
        assert self._process is not None
        return self._process.poll()

    @property
    def age_s(self) -> float:
        """How long ago it was started."""
        return time.monotonic() - self._started_s

    def end(self) -> None:
        """End it, and wait until it is gone."""
        if self._process is None or self._known is None:
            return
        self._known.send(signal.SIGTERM)
        try:
            self._process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            self._known.send(signal.SIGKILL)
            self._process.wait()
