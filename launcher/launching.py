"""From a run that may start to its end: the hosts, the directory, the attempts, the last words."""

from __future__ import annotations

import time

from launcher.announce import closing, opening
from launcher.attempts import carry_out
from launcher.checkpoint.lock import RunLock
from launcher.errors import ConfigError
from launcher.files import read_json
from launcher.prepare import Prepared


def start(prepared: Prepared) -> int:
    """Ask the hosts, write the run directory, start the ranks, stay until they end, and return the exit code."""
    if prepared.run.backend.asks_hosts:
        from launcher.examination import examined

        prepared = examined(prepared)
    directory = prepared.directory
    try:
        directory.logs.mkdir(parents=True, exist_ok=True)
        lock = RunLock(directory.path).acquire()
    except OSError as error:
        fix = "choose a folder you can write to"
        raise ConfigError("run.dir", directory.path, why=error.strerror or str(error), fix=fix) from error
    with lock:
        print("\n".join(opening(prepared.plan)), flush=True)
        if prepared.run.backend.hands_over:
            lock.release()
        started = time.monotonic()
        code = carry_out(prepared)
        if code == 0 and not prepared.run.backend.hands_over and directory.result.exists():
            print(closing(read_json(directory.result), elapsed_s=time.monotonic() - started), flush=True)
        return code
