"""Load balancers in tests: skipped where their programs are not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from load_balancer import FILES, KINDS, PACKAGES, SERVER, LoadBalancer, find_program, rendered

__all__ = ("FILES", "KINDS", "SERVER", "LoadBalancer", "check_command", "program", "rendered")


def program(kind: str) -> str:
    """Return the path of nginx or HAProxy; skip the test where it is not installed."""
    found = find_program(kind)
    if found is None:
        pytest.skip(f"{kind} is not installed: apt-get install {PACKAGES[kind]}")
    return found


def check_command(kind: str, file: Path) -> list[str]:
    """Return the command with which the program itself checks a configuration."""
    return [program(kind), "-t", "-c", str(file)] if kind == "nginx" else [program(kind), "-c", "-f", str(file)]
