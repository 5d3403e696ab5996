"""``native.c`` compiled for this machine, once, and what it takes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from launcher.build_once import build_once, default_cache
from launcher.errors import EnvironmentProblem

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


class Linear(Structure):
    """A packed matrix."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("weight", "bias")),
        *((name, c_int64) for name in ("out", "in_", "bits", "group")),
        *((name, c_void_p) for name in ("scale", "zero")),
        ("dynamic", c_int64),
    ]


class Block(Structure):
    """A decoder block of Llama's make."""

    _fields_: ClassVar = [
        *((name, Linear) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("norm1", "norm2")),
        *((name, c_float) for name in ("eps1", "eps2", "scale")),
        ("half", c_int32),
        *((name, c_int64) for name in ("width", "heads", "kv_heads", "dim", "mlp")),
    ]


class Tokens(Structure):
    """Where the tokens of a step are."""

    _fields_: ClassVar = [
        ("tokens", c_int64),
        *((name, c_void_p) for name in ("slots", "seen", "row", "pages")),
        ("table_width", c_int64),
        *((name, c_void_p) for name in ("cos", "sin")),
    ]


def native(beat: Callable[[], None] = lambda: None) -> Any:
    """Return the compiled library; the first call on a machine compiles it, in a few seconds.

    Raises:
        EnvironmentProblem: there is no C compiler, or it fails.
    """
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    if shutil.which(compiler[0]) is None:
        raise EnvironmentProblem(f"there is no C compiler ({compiler[0]}): apt-get install gcc, or set CC")
    made_of = [_SOURCE.read_bytes(), repr((compiler, _FLAGS)).encode(), _processor().encode()]
    folder = default_cache("native", hashlib.blake2b(b"".join(made_of), digest_size=12).hexdigest())

    def build(target: Path) -> None:
        command = [*compiler, *_FLAGS, "-o", str(target / "native.so"), str(_SOURCE), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EnvironmentProblem(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")

    return _load(build_once(folder, build, beat=beat) / "native.so")


@cache
def _load(file: Path) -> Any:
    library = ctypes.CDLL(str(file))
    library.native_block.argtypes = [POINTER(Block), POINTER(Tokens), *[c_void_p] * 5]
    library.native_linear.argtypes = [POINTER(Linear), c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32]
    library.native_attention.argtypes = [
        POINTER(Tokens),
        *[c_void_p] * 6,
        *[c_int64] * 3,
        c_float,
        c_int32,
        c_void_p,
    ]
    for name in ("native_block", "native_linear", "native_attention"):
        getattr(library, name).restype = None
    return library


def _processor() -> str:
    """Return what decides which instructions there are: a home folder may be shared by machines."""
    info = Path("/proc/cpuinfo")
    flags = (
        next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.is_file() else ""
    )
    return f"{platform.machine()} {flags}"
