"""The real nginx and HAProxy, started with what ``launch deploy`` renders."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.deploy.prepare import prepare
from launcher.deploy.registry import render
from launcher.utils.system import free_port
from tests.helpers import wait_for
from tests.processes import kill_marked, marked_environment, new_mark

KINDS = ("nginx", "haproxy")
FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}
SERVE = ("job=serve", "model=gpt2_tiny", "job.engine=echo", "job.tokenizer=bytes", "tracker=local")
_PACKAGES = {"nginx": "nginx-light", "haproxy": "haproxy"}


def program(kind: str) -> str:
    """Return the path of nginx or HAProxy; skip the test where it is not installed."""
    found = shutil.which(kind, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        pytest.skip(f"{kind} is not installed: apt-get install {_PACKAGES[kind]}")
    return found


def rendered(kind: str, *words: str) -> str:
    """Return the configuration for a server with small limits."""
    return render(*prepare([*SERVE, f"deploy={kind}", "deploy.out=x", *words]))[FILES[kind]]


def check_command(kind: str, file: Path) -> list[str]:
    """Return the command with which the program itself checks a configuration."""
    return [program(kind), "-t", "-c", str(file)] if kind == "nginx" else [program(kind), "-c", "-f", str(file)]


class Proxy:
    """A load balancer that runs.

    Args:
        kind: ``nginx`` or ``haproxy``.
        folder: for its files.
        words: options of the group deploy, and of the server.
        edited: what happens to the configuration before it is used.
    """

    def __init__(
        self, kind: str, folder: Path, *words: str, edited: Callable[[str], str] = lambda text: text
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port, self._mark, self._log = free_port(), new_mark(), folder / "output.txt"
        own = (f"deploy.temporary_folder={folder}", "deploy.log_folder=null") if kind == "nginx" else ()
        file = folder / FILES[kind]
        file.write_text(edited(rendered(kind, f"deploy.port={self.port}", *own, *words)))
        flags = ["-e", "stderr", "-g", "daemon off;", "-c"] if kind == "nginx" else ["-db", "-f"]
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [program(kind), *flags, str(file)],
                env=marked_environment(self._mark),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        wait_for(self._listens, seconds=60, process=self._process, shown=self._log.read_text)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        """What it logged."""
        return self._log.read_text()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        """End it and all its workers."""
        kill_marked(self._mark)
        self._process.wait()
