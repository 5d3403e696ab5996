"""URLs in options: files of a run store them unmasked, so they hold no login and no token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from launcher.errors import ConfigError

HTTP = ("http", "https")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>\S+)")
_WITH_CONTAINER = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes of Azure, with ``CONTAINER@ACCOUNT`` in place of a host."""


def validate_url(
    option: str, url: str, *, what: str, example: str, schemes: Sequence[str] | None = None
) -> Iterator[ConfigError]:
    """Yield why ``url`` is none that an option takes.

    The text is not shown where it may hold a secret.

    Args:
        option: that holds it.
        url: the value.
        what: the option takes: ``an address``.
        example: of such a URL.
        schemes: those that are accepted; ``None`` accepts all.
    """
    found, fix = _URL.fullmatch(url), f"write it like {example}"
    if found is None or (schemes is not None and found["scheme"] not in schemes):
        yield ConfigError(option, url, why=f"is not {what}", fix=fix)
    elif _has_login(found["scheme"], found["rest"]):
        yield ConfigError(option, why=f"is not {what} without a login, and files of the run store it unmasked", fix=fix)
    elif set("?#") & set(found["rest"]):
        yield ConfigError(option, why=f"is not {what} alone: no ? or # may follow it", fix=fix)


def _has_login(scheme: str, rest: str) -> bool:
    """Return whether a user or a password comes before the host; a password may hold a slash."""
    before, at, _ = rest.rpartition("@")
    if not at or (scheme in _WITH_CONTAINER and ":" not in before):
        return False
    return ":" in before or "/" not in before
