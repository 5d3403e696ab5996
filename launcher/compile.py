"""torch.compile."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from launcher.component import Component
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Compile(Component):
    """Whether the repeated blocks of a model are compiled; typed ``compile=true`` or ``compile=false``."""

    group: ClassVar[str] = "compile"

    def preflight(self) -> Iterator[ConfigError]:
        """Yield what this machine, where ranks compute on the CPU, lacks to compile."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class Interpreted(Compile):
    """Run every operation as Python calls it."""

    kind: ClassVar[str] = "false"


@dataclass(frozen=True, kw_only=True)
class CompiledBlocks(Compile):
    """Compile each block in place at its first use; the blocks of a model share what is compiled."""

    kind: ClassVar[str] = "true"

    def preflight(self) -> Iterator[ConfigError]:
        """Yield a missing C++ compiler."""
        if lacks_compiler(os.environ, which=shutil.which):
            yield self.no_compiler()

    def no_compiler(self) -> ConfigError:
        """Return the refusal of a machine without a C++ compiler."""
        why = "torch compiles for the CPU with a C++ compiler, and there is none"
        return ConfigError("compile", self.kind, why=why, fix="apt-get install g++, or set CXX, or compile=false")


def quote_torch_libraries() -> None:
    """Let torch link what it compiles where its own path holds a space: it writes ``-L`` of that path without quotes.

    Every process calls this before it compiles or loads: with another command ninja would link again.
    """
    found = find_spec("torch")
    if found is None or not found.origin or shlex.quote(found.origin) == found.origin:
        return
    from torch.utils import cpp_extension

    if not cpp_extension.TORCH_LIB_PATH.startswith("'"):
        cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)


def lacks_compiler(environ: Mapping[str, str], *, which: Callable[[str], str | None]) -> bool:
    """Whether there is no C++ compiler where torch looks for one: in CXX, else g++."""
    return which(environ.get("CXX", "g++")) is None
