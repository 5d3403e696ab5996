"""torch.compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from launcher.component import Component


@dataclass(frozen=True, kw_only=True)
class Compile(Component):
    """Whether the repeated blocks of a model are compiled; the option is typed ``compile=true`` or ``compile=false``."""

    group: ClassVar[str] = "compile"


@dataclass(frozen=True, kw_only=True)
class Interpreted(Compile):
    """Run every operation as Python calls it."""

    kind: ClassVar[str] = "false"


@dataclass(frozen=True, kw_only=True)
class CompiledBlocks(Compile):
    """Compile each block in place at its first use; the blocks of a model share what is compiled."""

    kind: ClassVar[str] = "true"
