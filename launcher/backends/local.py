"""This machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from launcher.backends.base import Backend


@dataclass(frozen=True, kw_only=True)
class Local(Backend):
    """Ranks are processes of this machine."""

    kind: ClassVar[str] = "local"
