"""Lines of ``backend.setup`` as bash, in the batch script and before the agent of a node.

Each line stands there as the user wrote it. Slurm's srun hands the variables that the batch script has set to every
node; the lines run there again for what variables do not carry (folders, limits, mounts).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from launcher.errors import EXIT_UNFIT

FAILED_FLAG = "--setup-failed"
"""Argument of the entry point: the text that follows says which line failed."""


def setup_in_batch_script(lines: Sequence[str], *, on_failure: str) -> list[str]:
    """Return the lines of bash of a batch script; empty without setup.

    Args:
        lines: as the user gave them.
        on_failure: a command that records the failure; it gets the message as its last argument.
    """
    if not lines:
        return []
    record = f'{on_failure} {FAILED_FLAG} "$launcher_message"'
    preempted = "trap : USR1  # a signal that comes meanwhile: nothing is there to save"
    return [*_checked(lines, record), preempted, *_each(lines), *_done(), ""]


def setup_on_node(lines: Sequence[str]) -> tuple[str, ...]:
    """Return a prefix of a command line that runs the lines first; empty without setup.

    The agent's messages are on stdin and stdout: the lines read nothing and print to stderr.
    """
    if not lines:
        return ()
    apart = "exec {launcher_in}<&0 {launcher_out}>&1 </dev/null >&2"
    back = "exec <&$launcher_in >&$launcher_out {launcher_in}<&- {launcher_out}>&-"
    script = "\n".join([*_checked(lines, ""), apart, *_each(lines), *_done(), back, 'exec "$@"'])
    return ("bash", "-c", script, "bash")


def _checked(lines: Sequence[str], record: str) -> list[str]:
    """Return what prints one message where a line fails or ends the shell itself."""
    return [
        "launcher_setup_failed() {",
        '  launcher_message="backend.setup: this line ended with exit code $?: $launcher_line"',
        "  trap - EXIT",
        '  echo "launcher: $launcher_message" >&2',
        *([f"  {record}"] if record else []),
        f"  exit {EXIT_UNFIT}",
        "}",
        "trap launcher_setup_failed EXIT",
    ]


def _each(lines: Sequence[str]) -> list[str]:
    check = "launcher_code=$?; [ $launcher_code = 0 ] || exit $launcher_code"
    return [text for line in lines for text in (f"launcher_line={shlex.quote(line)}", line, check)]


def _done() -> list[str]:
    return ["trap - EXIT"]
