"""The real nginx or HAProxy, started with what ``launch deploy`` renders."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.deploy.folder import write
from launcher.deploy.prepare import prepare
from launcher.deploy.registry import render
from launcher.utils.system import free_port

KINDS = ("nginx", "haproxy")
FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}
PACKAGES = {"nginx": "nginx-light", "haproxy": "haproxy"}
SERVER = ("job=serve", "model=gpt2_tiny", "job.engine=echo", "job.tokenizer=bytes", "tracker=local")
"""A server that echoes prompts, without a model."""
_START_S = 60.0


def find_program(kind: str) -> str | None:
    """Return the path of nginx or HAProxy."""
    return shutil.which(kind, path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def rendered(kind: str, words: Sequence[str] = (), *, server: Sequence[str] = SERVER) -> str:
    """Return the configuration of a load balancer.

    Args:
        kind: ``nginx`` or ``haproxy``.
        words: further overrides, of the group deploy and of the server.
        server: overrides of the server.
    """
    return rendered_files(kind, words, server=server)[FILES[kind]]


def rendered_files(kind: str, words: Sequence[str] = (), *, server: Sequence[str] = SERVER) -> dict[str, str]:
    """Return all files of the folder of a load balancer; arguments as for ``rendered``."""
    files = render(*prepare([*server, f"deploy={kind}", "deploy.out=x", *words]))
    return {path: text for path, text in files.items() if isinstance(text, str)}


class LoadBalancer:
    """One that runs, as this user, on a port of this machine.

    Args:
        kind: ``nginx`` or ``haproxy``.
        folder: for its files.
        words: overrides of the group deploy, and of the server.
        edit: changes the configuration before it is used.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        words: Sequence[str],
        *,
        edit: Callable[[str], str] = lambda text: text,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        program = find_program(kind)
        if program is None:
            raise FileNotFoundError(f"{kind} is not installed: apt-get install {PACKAGES[kind]}")
        self.port, self._log = free_port(), folder / "output.txt"
        own = (f"deploy.temporary_folder={folder}", "deploy.log_folder=null") if kind == "nginx" else ()
        file = folder / FILES[kind]
        files = rendered_files(kind, (f"deploy.port={self.port}", *own, *words))
        write(folder, {**files, FILES[kind]: edit(files[FILES[kind]])})
        flags = ["-e", "stderr", "-g", "daemon off;", "-c"] if kind == "nginx" else ["-db", "-f"]
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [program, *flags, str(file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        """What it logged."""
        return self._log.read_text()

    def _wait(self) -> None:
        until = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            time.sleep(0.02)
        self.close()
        raise RuntimeError(f"it does not listen:\n{self.output}")

    def close(self) -> None:
        """End it and its workers."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
            self._process.wait()
