"""``python -m launcher.ops NAME…``: build operators on a host before its ranks start.

A name that ends in ``?`` is optional.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

from launcher.errors import EXIT_USER_ERROR, EnvironmentProblem
from launcher.ops.build import build_ops


def main(arguments: list[str]) -> int:
    """Build the operators named and return the exit status."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        build_ops(arguments, say=_say)
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    return 0


def _leave(number: int, frame: FrameType | None) -> None:
    """Turn a signal into an exit, so that compilers are stopped before it."""
    raise SystemExit(128 + number)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
