"""The command line: a verb, or overrides that compose, plan and run."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.parser import run_command
from launcher.errors import ConfigError, LauncherError
from launcher.errors.secrets import redact
from launcher.utils.system import describe_full_disk, is_disk_full_error
from launcher.utils.text import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal in Latin-1 or ASCII shows ? for what it has not
        sys.stdout.reconfigure(errors="replace" if sys.stdout.errors == "strict" else None)
    try:
        return run_command(words)
    except LauncherError as error:
        print(f"error: {printable(redact(str(error), os.environ))}".replace("\n", "\nerror: "), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # while a run lasts, its session takes it
        print("interrupted: nothing is running", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `launch list | head`: the reader has gone, nothing is left to say
        sys.stderr.close()
        return 0
    except OSError as error:
        if why := _unusable_folder():
            print(f"error: the current folder {why}; cd to another one, then run the command again", file=sys.stderr)
            return ConfigError.exit_code
        if not is_disk_full_error(error):
            raise
        folder = Path(error.filename or ".").absolute().parent
        print(
            f"error: {describe_full_disk(folder) or error}: free some space, then run the command again",
            file=sys.stderr,
        )
        return 1


def _unusable_folder() -> str | None:
    """Return why no relative path works in the current folder, if none does."""
    try:
        folder = Path.cwd()
    except FileNotFoundError:
        return "was removed"
    return None if os.access(folder, os.X_OK) else f"({folder}) cannot be opened by this user (permission denied)"


if __name__ == "__main__":
    sys.exit(main())
