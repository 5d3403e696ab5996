"""Run a function in a process of its own, so that it leaves nothing behind."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.config.component import Component
from launcher.config.profile import TorchProfile
from launcher.errors import ConfigError, JobError
from launcher.profiling.profiler import NO_PROFILER, Profiler, make_profiler
from launcher.utils.schema import build, to_tree


def pack_component(component: Component) -> dict[str, Any]:
    """Return a component as JSON values, which ``unpack_component`` turns into an equal one."""
    cls = type(component)
    values = {name: value for name, value in to_tree(component).items() if name != "kind"}
    return {"class": f"{cls.__module__}:{cls.__qualname__}", "values": values}


def unpack_component(tree: dict[str, Any]) -> Any:
    """Return the component that ``pack_component`` was given."""
    module, _, name = tree["class"].partition(":")
    return build(getattr(importlib.import_module(module), name), tree["values"], path=name, report=_raise)


def _raise(error: ConfigError) -> None:
    raise error


_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Environment of glibc's allocator: tensors of 1 MiB and more are returned when freed.
glibc raises this limit when large blocks are freed, and then keeps them. With a fixed limit the high-water mark
follows the live tensors. Code that allocates and frees such tensors all the time gets slower: decoding with dequantized
weights takes half as long again."""


def run_isolated(
    function: str,
    arguments: Mapping[str, Any],
    *,
    heartbeat: Callable[[], None],
    profile: Mapping[str, Any] | None = None,
    exact_peaks: bool = False,
) -> dict[str, Any]:
    """Call a function in a fresh interpreter and return its result.

    Args:
        function: ``module:name``; it takes ``arguments`` and ``progress``, and returns what JSON can hold.
        arguments: what JSON can hold.
        heartbeat: called whenever the function calls its ``progress``: without it the rank counts as stalled.
        profile: have the process recorded: ``options`` of the run's profile, ``folder`` and ``name`` of the files.
        exact_peaks: have every large tensor leave the process when it is freed, where peak memory is measured.

    Raises:
        JobError: the process failed; what it printed is in this rank's log.
    """
    command = [sys.executable, "-m", "launcher.benchmarks.isolated", function, json.dumps(profile)]
    answer: dict[str, Any] | str | None = None
    env = {**os.environ, **(_ALLOCATOR if exact_peaks else {})}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdin is not None, "asked for above"
        assert process.stdout is not None, "asked for above"
        process.stdin.write(json.dumps(arguments))
        process.stdin.close()
        for line in process.stdout:
            heartbeat()
            answer = json.loads(line)
    if isinstance(answer, str):
        raise JobError(f"{function} failed: {answer}; the log of this rank has its traceback")
    if process.returncode or answer is None:
        raise JobError(f"{function} ended with {process.returncode}; the log of this rank says why")
    return answer


def main() -> None:
    """Entry point of the isolated process: arguments on stdin, progress and answer on stdout.

    Each line on stdout is progress (null); the last one is the answer.

    Text as the answer is the exception that ended the function.
    """
    import importlib

    protocol = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print goes to the log

    def send(value: dict[str, Any] | str | None) -> None:
        protocol.write(json.dumps(value) + "\n")
        protocol.flush()

    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    try:
        with _profiler(json.loads(sys.argv[2])):
            answer = function(**json.load(sys.stdin), progress=lambda: send(None))
    except Exception as error:
        send(traceback.format_exception_only(error)[-1].strip())
        raise
    send(answer)


def _profiler(asked: Mapping[str, Any] | None) -> Profiler:
    if asked is None:
        return NO_PROFILER
    options = TorchProfile(**asked["options"])
    return make_profiler(options, unit="time", folder=Path(asked["folder"]), name=asked["name"])


if __name__ == "__main__":
    main()
