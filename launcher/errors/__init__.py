"""Every error this program raises on purpose.

LauncherError                 printed as a message, without a traceback
├── ConfigError               what the user wrote cannot work; exit 2, nothing started
│   └── ConfigErrors          several of them, found in one pass
├── EnvironmentProblem        this machine lacks something the run needs; exit 2, nothing started
├── Unfit                     a host of the run is not fit for it; exit 69, nothing started
└── JobError                  a rank found a reason to end the run (a non-finite loss, a bad checkpoint)

Exit code 2 means that nothing was started. The same errors raised on a rank end it with the code that
:func:`exit_code_of_rank` returns: 65 for data or weights that only a rank can find bad, 69 for what its host lacks.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.errors.secrets import hide_secrets

EXIT_USER_ERROR = 2
EXIT_BAD_INPUT = 65
"""Exit code of a rank with bad data, weights or options: a restart would fail (EX_DATAERR)."""
EXIT_UNFIT = 69
EXIT_PREEMPTED = 75
EXIT_STALLED = 124

_LINE_ENDS = {ord("\n"): "\\n", ord("\r"): "\\r"}
"""An error is one line, also of a path or value that holds line ends."""


class LauncherError(Exception):
    """Base of all errors meant to be read by a user."""

    exit_code = EXIT_USER_ERROR


class ConfigError(LauncherError):
    """One thing the user wrote that cannot work.

    Args:
        option: the option as the user types it (``job.steps``).
        value: what it was set to; ``None`` when the option itself is the trouble.
        why: why that cannot work, with the arithmetic where there is any.
        fix: what would work.
        source: where the value came from (``conf/exp/x.yaml:3``, ``command line``).
    """

    def __init__(self, option: str, value: object = None, *, why: str, fix: str, source: str | None = None) -> None:
        self.option, self.value, self.why, self.fix, self.source = option, value, why, fix, source
        super().__init__(str(self))

    def __str__(self) -> str:
        value = f"[{', '.join(map(str, self.value))}]" if isinstance(self.value, tuple) else self.value  # as typed
        shown = self.option if value is None else f"{self.option}={value}"
        origin = f" ({self.source})" if self.source else ""
        return hide_secrets(f"{shown}{origin}: {self.why}; {self.fix}").translate(_LINE_ENDS)


class ConfigErrors(ConfigError):
    """All errors of one command, so that the user can correct them at once."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        assert errors, "an empty list of errors is not an error"
        self.errors = tuple(errors)
        first = errors[0]
        super().__init__(first.option, first.value, why=first.why, fix=first.fix, source=first.source)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class EnvironmentProblem(LauncherError):
    """The machine lacks something; the message says what to type."""


class Unfit(LauncherError):
    """The doctor found what would break the run on some host; the message is its report."""

    exit_code = EXIT_UNFIT


class JobError(LauncherError):
    """A rank ends the run for a reason the user can act on.

    Args:
        message: what the user reads.
        exit_code: of the rank; another process's own where the rank passes on how that one ended.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def exit_code_of_rank(error: LauncherError) -> int:
    """Return the exit code of a process of a started run that ``error`` ends; never 2."""
    if isinstance(error, ConfigError):
        return EXIT_BAD_INPUT
    if isinstance(error, JobError):
        return error.exit_code
    return EXIT_UNFIT
