"""A server for the time of a benchmark: ``job=serve`` with the run's model, as a run of its own inside this one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from launcher.errors import JobError
from launcher.schema import to_tree

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.context import Context

_READY_S, _END_S, _POLL_S = 600.0, 60.0, 0.2
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
"""What this rank was told of its own run, and the server must not take for its."""


@contextlib.contextmanager
def own_server(options: Mapping[str, Any], context: Context) -> Iterator[str]:
    """Start a server, yield its address once it is ready, end it.

    Args:
        options: of job=serve.
        context: of this rank; the server has the run's model, precision, attention and strategy.

    Raises:
        JobError: it does not get ready; its log says why.
    """
    folder, port = context.run_dir.path / "server", _free_port()
    folder.mkdir(exist_ok=True)
    tree = to_tree(context.run)
    tree["job"] = {"kind": "serve", "seed": context.run.job.seed, "port": port, **options}
    tree["benchmark"], tree["tracker"] = {"kind": "none"}, {"kind": "local"}
    if options.get("engine", "slots") != "slots":
        tree["profile"] = {"kind": "false"}  # other engines have nothing to record
    (folder / "run.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if not _is_of_ranks(name)}
    log = folder / "server.log"
    command = [sys.executable, "-m", "launcher", "resume", str(folder)]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log, context)
        yield url
    finally:
        _end(process)


def _is_of_ranks(name: str) -> bool:
    return name in _OF_RANKS or name.startswith(("TORCHELASTIC_", "LAUNCHER_", "GROUP_", "ROLE_", "TORCH_NCCL_"))


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, context: Context) -> None:
    until = time.monotonic() + _READY_S
    while process.poll() is None and time.monotonic() < until:
        context.heartbeat.beat("start the server")
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as answer:  # noqa: S310 (this machine)
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            time.sleep(_POLL_S)
    text = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise JobError(f"the server did not get ready; {log} ends with:\n{text}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, which it does once it has answered; what is left after that is killed."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
