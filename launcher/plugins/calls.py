"""Calls of a plugin's code on a rank: an exception in it names the plugin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from launcher.errors import JobError, LauncherError, exit_code_of_rank
from launcher.plugins.loading import origin_of


class PluginError(Exception):
    """A plugin's code raised an exception, the cause of this one; shown with its traceback."""


def plugin_name(group: str, kind: str) -> str:
    """Return group, kind and plugin of what a plugin adds, as errors name it."""
    return f"{group} {kind} ({origin_of(group, kind) or 'no plugin'})"


@contextmanager
def named_in_errors(group: str, kind: str, method: str = "") -> Iterator[None]:
    """In this context, make exceptions name what a plugin adds.

    Args:
        group: of what is called.
        kind: of what is called.
        method: that is called, if any.

    Raises:
        JobError: for an error of the launcher's own, with its message and exit code.
        PluginError: for any other exception, ``SystemExit`` included: other ranks would wait for one that exits.
    """
    where = plugin_name(group, kind) + (f", {method}" if method else "")
    try:
        yield
    except PluginError:
        raise
    except LauncherError as error:
        raise JobError(f"{where}: {error}", exit_code=exit_code_of_rank(error)) from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"{where}: {type(error).__name__}: {error}") from error
