"""The process of ``launch chat``: ``python -m launcher.jobs.chat RUN_YAML``."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from pathlib import Path
from typing import cast

from launcher.config.job.generate import Generate
from launcher.config.snapshot import load_run
from launcher.errors import LauncherError, exit_code_of_rank
from launcher.inference.chat import Chat, edit_lines, sampling_of
from launcher.inference.engine.registry import make_engine
from launcher.inference.tokenizer import open_tokenizer
from launcher.utils.logs import quiet_libraries
from launcher.utils.processes import die_with_parent


def main() -> int:
    """Load the model of a snapshot and talk."""
    die_with_parent(os.getppid())
    quiet_libraries()
    try:
        _talk(Path(sys.argv[1]))
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of_rank(error)
    except KeyboardInterrupt:  # while the model is loaded
        return 128 + signal.SIGINT
    return 0


def _talk(snapshot: Path) -> None:
    run = load_run(snapshot)
    job = cast("Generate", run.job)
    if sys.stdin.isatty():
        edit_lines()
        print(f"loading {run.model.name} …", flush=True)
    with contextlib.redirect_stdout(io.StringIO()):  # lines for a run's log
        tokenizer = open_tokenizer(job.tokenizer, run, heartbeat=_nothing, template=job.chat_template)
        engine = make_engine(run, job, heartbeat=_nothing)
    try:
        chat = Chat(
            engine=engine,
            tokenizer=tokenizer,
            sampling=sampling_of(job),
            adapter=job.adapter or "",
            stop=job.stop,
            seed=job.seed,
        )
        chat.run()
    finally:
        engine.close()


def _nothing() -> None:
    """Report no progress: no process waits for it."""


if __name__ == "__main__":
    sys.exit(main())
