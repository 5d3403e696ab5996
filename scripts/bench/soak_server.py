"""The server of the soak: started as a user starts it, looked at from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from launcher.utils.system import free_port

REQUEST_TIMEOUT_S = 240.0
"""Time after which the server fails the requests that still wait."""
_READY_S, _END_S, _IDLE_S = 300.0, 90.0, 60.0
_ENGINE = "launcher.inference.server.replica"
_READY = re.compile(r"^\w+:engines_ready(?:\{.*\})? (\S+)$", re.MULTILINE)
_UNDER_WAY = re.compile(r"^\w+:num_requests_(?:running|waiting)(?:\{.*\})? (\S+)$", re.MULTILINE)


class SoakServer:
    """``python -m launcher job=serve`` with some engines.

    Args:
        overrides: of the run.
        replicas: engines.
        folder: for its run directory and its log.
        port: on which it listens; ``None`` takes a free one.
    """

    def __init__(self, overrides: Sequence[str], *, replicas: int, folder: Path, port: int | None = None) -> None:
        port = port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "server.log"
        words = [f"job.replicas={replicas}", f"job.port={port}", "job.result_cache_bytes=0", "tracker=local"]
        words.append(f"job.request_timeout_s={REQUEST_TIMEOUT_S:g}")
        command = [
            sys.executable,
            "-m",
            "launcher",
            "job=serve",
            "parallel=single",
            *words,
            f"run.dir={folder / 'run'}",
        ]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *overrides],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.replicas = replicas

    def get(self, path: str) -> tuple[int, str]:
        """Return status and body of what is at a path; status 0 without an answer."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:  # noqa: S310 (this machine)
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (OSError, urllib.error.URLError):
            return 0, ""

    def wait_until_ready(self) -> None:
        """Wait for /health/ready.

        Raises:
            RuntimeError: it never comes; the message holds the end of the log.
        """
        until = time.monotonic() + _READY_S
        while self.get("/health/ready")[0] != 200 or len(self.engines()) < self.replicas:
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not become ready:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.3)

    def model(self) -> str:
        """Return what it calls its model."""
        named: dict[str, Any] = json.loads(self.get("/v1/models")[1])
        return str(named["data"][0]["id"])

    def processes(self) -> list[psutil.Process]:
        """Return its processes: launcher, agents, ranks, engines."""
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def engines(self) -> list[psutil.Process]:
        """Return the processes of its engines, the oldest first."""
        found = []
        for process in self.processes():
            try:
                if _ENGINE in process.cmdline():
                    found.append((process.create_time(), process.pid, process))
            except psutil.Error:
                continue
        return [process for _, _, process in sorted(found, key=lambda entry: entry[:2])]

    def under_way(self) -> float:
        """Return the requests that engines work on or hold in their queues, as /metrics tells.

        Raises:
            RuntimeError: it tells nothing.
        """
        values = _UNDER_WAY.findall(self.get("/metrics")[1])
        if not values:
            raise RuntimeError("/metrics does not say how many requests are under way")
        return sum(map(float, values))

    def ready_engines(self) -> float:
        """Return how many engines can be given requests, as /metrics tells."""
        return sum(map(float, _READY.findall(self.get("/metrics")[1])))

    def wait_until_idle(self) -> float:
        """Return the requests that are still in engines when they had time enough to end."""
        until = time.monotonic() + _IDLE_S
        while (left := self.under_way()) and time.monotonic() < until:
            time.sleep(0.5)
        return left

    def terminate(self) -> int | None:
        """Send SIGTERM and return the exit code; ``None`` where it does not end."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End whatever is left of it."""
        left = self.processes() if self._process.poll() is None else []
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if left:
            os.waitpid(self._process.pid, 0)
