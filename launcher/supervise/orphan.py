"""What an agent writes down when the session that should have done so is gone."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

from launcher.results import write_result
from launcher.rundir import RunDir
from launcher.supervise.messages import Assignment

_EXIT_CODE = 128 + signal.SIGKILL
"""Of the session: nothing else ends it without a word."""


def conclude_alone(assignment: Assignment, *, is_first: bool) -> int:
    """Write ``result.json`` unless there is one, on the first host only; return the exit code of the run."""
    run_dir = RunDir(Path(assignment.run_dir))
    if is_first and not run_dir.result.exists():
        with contextlib.suppress(OSError):  # a full disk: nothing is left that could be told of it
            write_result(run_dir, status="cancelled", exit_code=_EXIT_CODE, run_id=assignment.run_id)
    return _EXIT_CODE
