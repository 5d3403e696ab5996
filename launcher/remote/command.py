"""A command that runs a module on a host, with its stdin and stdout on ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Remote:
    """How to start it from here."""

    argv: tuple[str, ...]
    """Passed as it is, never through a shell of this machine."""
    prologue: bytes = b""
    """Written to its stdin before anything else."""
