"""Facts about the planning machine: gathered first, then given to the planner as a value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.config.run import Run


@dataclass(frozen=True, kw_only=True)
class LocalFacts:
    """Answers of the file system and the environment."""

    environ: Mapping[str, str] = field(repr=False)
    """What ranks and trackers inherit. It holds secrets: nothing of it goes into a plan but what a tracker says."""
    home: Path
    """The user's home, where trackers keep credentials."""
    ops_folder: str = ""
    """Where DeepSpeed's native ops of this environment are built; empty when the run has no use for it."""
    missing_ops: tuple[str, ...] = ()
    """Arguments of ``python -m launcher.ops`` for the native ops that are not built yet."""


def gather_local_facts(run: Run, *, run_dir: str) -> LocalFacts:
    """Return the facts of this machine for a run in ``run_dir``."""
    environ, home = dict(os.environ), Path.home()
    if "deepspeed" not in (run.parallel.engine, run.backend.agent):
        return LocalFacts(environ=environ, home=home)
    from launcher.protocol.native_ops import (  # reads package versions, which takes its time
        ops_arguments,
        ops_folder,
        ops_to_build,
    )

    ops = run.parallel.native_ops(run.optimizer)
    # other machines are not looked into: there, the command that builds finds out by itself
    is_elsewhere = run.backend.probes_hosts or not run.backend.sees_files_of_hosts(run_dir)
    missing_ops = ops_arguments(ops) if is_elsewhere else ops_to_build(ops)
    return LocalFacts(environ=environ, home=home, ops_folder=str(ops_folder()), missing_ops=missing_ops)
