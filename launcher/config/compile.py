"""torch.compile: which parts of a model are compiled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.component import Component
from launcher.errors import ConfigError
from launcher.utils.build_cache import lacks_compiler


@dataclass(frozen=True, kw_only=True)
class Compile(Component):
    """Whether the model's repeated blocks are compiled: ``compile=true`` or ``compile=false``."""

    group: ClassVar[str] = "compile"

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield what compilation needs and this machine lacks, if ranks compute on the CPU."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class NoCompile(Compile):
    """Run every operation as Python calls it."""

    kind: ClassVar[str] = "false"


@dataclass(frozen=True, kw_only=True)
class RegionalCompile(Compile):
    """Compile each block in place at its first use; equal blocks share the compiled code."""

    kind: ClassVar[str] = "true"

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield a missing C++ compiler."""
        if lacks_compiler(os.environ, which=shutil.which):
            yield self.no_compiler()

    def no_compiler(self) -> ConfigError:
        """Return the error for a machine without a C++ compiler."""
        why = "torch.compile needs a C++ compiler on a CPU, and there is none"
        return ConfigError("compile", self.kind, why=why, fix="apt-get install g++, or set CXX, or compile=false")
