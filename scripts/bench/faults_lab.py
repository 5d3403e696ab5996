"""The hosts that one worker breaks, and recreates."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Self

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "lab"))

from hostlab.lab import Lab, up
from hostlab.needs import missing
from hostlab.process import LabError

__all__ = ["Hosts", "Lab", "LabError", "missing"]

_MOST = 3


class Hosts:
    """A lab of three hosts that is there when it is asked for; closed, or when this process dies, it is gone."""

    def __init__(self) -> None:
        self._lab: Lab | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="faults")
        self._count = 0
        self._leash, self._writer = os.pipe()

    def lab(self) -> Lab:
        """Return the hosts, all of them whole."""
        if self._lab is None:
            self._count += 1
            subnet = f"10.{random.randrange(128, 256)}.{random.randrange(256)}"
            folder = Path(self._folder.name) / str(self._count)
            self._lab = up(folder, "host", _MOST, subnet=subnet, leash=self._leash)
        return self._lab

    def break_down(self) -> None:
        """Give the hosts up: the next ones are new."""
        if self._lab is not None:
            self._lab.down()
            self._lab = None

    def strike(self, name: str, how: str) -> None:
        """Let one of ``DISASTERS`` happen to a host."""
        lab = self.lab()
        match how:
            case "power off":
                lab.power_off(name)
            case "link down":
                lab.fault(name, "down")
            case "link cut":
                lab.fault(name, "cut")
            case _:
                lab.kill_sshd(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.break_down()
        os.close(self._leash)
        os.close(self._writer)
        self._folder.cleanup()
